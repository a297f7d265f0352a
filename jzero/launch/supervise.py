"""Attempts until the job ends well, is told to end, or has used up its restarts."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import NamedTuple

from jzero.launch import codes, environment, ranks
from jzero.launch.options import WHO, Options

_MOST_BACKOFF_SECONDS = 60.0
_SETTLE_SECONDS = 0.2  # deaths this close together are one event
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_END = {signal.SIGTERM: codes.PREEMPTED, signal.SIGINT: codes.INTERRUPTED, signal.SIGHUP: 128 + signal.SIGHUP}


class Outcome(NamedTuple):
    """How an attempt ended."""

    code: int
    num_dead: int = 0  # processes that died first


class Supervisor:
    """The state of one job: the processes of this attempt, and whether it was told to end."""

    def __init__(self, options: Options):
        self.options = options
        self.ranks: list[ranks.Rank] = []
        self.told: signal.Signals | None = None  # the signal that ends the job
        self.deadline = 0.0
        self.woken = asyncio.Event()

    async def run(self) -> int:
        """The job's exit code."""
        loop, options = asyncio.get_running_loop(), self.options
        for number in _FORWARDED:
            loop.add_signal_handler(number, self._on_signal, number)
        num_processes, restart = options.processes, 0
        while True:
            outcome = await self._attempt(num_processes, restart)
            left = num_processes - outcome.num_dead
            if outcome.code == 0 or self.told is not None or restart >= options.max_restarts:
                return outcome.code
            num_processes = left if options.min_processes <= left < options.processes else options.processes
            delay = min(options.backoff * 2**restart, _MOST_BACKOFF_SECONDS)
            restart += 1
            say(f"restart {restart} of {options.max_restarts} with {num_processes} processes in {delay:g} s")
            await self._pause(delay)
            if self.told is not None:
                return _END[self.told]

    async def _attempt(self, num_processes: int, restart: int) -> Outcome:
        options = self.options
        command = [sys.executable, *(["-m"] if options.module else []), options.script, *options.args]
        with environment.reserve_port() as held:
            environments = [
                environment.for_rank(
                    os.environ, rank, num_processes, held.getsockname()[1], devices=options.devices_per_process,
                    step_timeout=options.step_timeout, restart=restart,
                )
                for rank in range(num_processes)
            ]  # fmt: skip
            self.ranks = await ranks.start(command, environments)
            return await self._watch()

    async def _watch(self) -> Outcome:
        """Until all have ended well, one has died, or a signal ends the job."""
        waits = {asyncio.create_task(rank.process.wait()) for rank in self.ranks}
        woken = asyncio.create_task(self.woken.wait())
        pending = waits
        while pending and self.told is None and not self._dead():
            done, _ = await asyncio.wait({*pending, woken}, return_when=asyncio.FIRST_COMPLETED)
            pending = pending - done
        woken.cancel()
        if self.told is not None:
            return await self._ended()
        if self._dead():
            noticed = self._dead()
            await asyncio.sleep(_SETTLE_SECONDS)
            return await self._died(noticed)
        await ranks.gone(self.ranks, time.monotonic())
        return Outcome(0)

    def _dead(self) -> list[ranks.Rank]:
        return [rank for rank in self.ranks if rank.returncode]

    async def _died(self, noticed: list[ranks.Rank]) -> Outcome:
        dead = self._dead()
        for rank in dead:
            say(f"rank {rank.number} of {len(self.ranks)} {codes.describe(rank.returncode or 0)}; ending the others")
        hung = any(rank.returncode == codes.FAILED_TO_STEP for rank in dead)
        first = _lost(dead) or noticed
        if hung:
            await ranks.dump_stacks(self.ranks)
        for rank in ranks.alive(self.ranks):  # without a peer nothing can be saved: no grace
            rank.process.kill()
        await ranks.gone(self.ranks, time.monotonic())
        code = codes.FAILED_TO_STEP if hung else codes.readable(first[0].returncode or 0)
        return Outcome(code, 0 if hung else len(first))

    async def _ended(self) -> Outcome:
        """A signal was passed on: wait out the grace period."""
        assert self.told is not None
        await ranks.gone(self.ranks, self.deadline)
        found = [rank.returncode or 0 for rank in self.ranks]
        lost = [rank.number for rank in self.ranks if rank.returncode == -signal.SIGKILL]
        if lost:
            say(f"ranks {lost} did not end within the grace period of {self.options.grace:g} s: SIGKILL")
            return Outcome(codes.readable(-signal.SIGKILL))
        if not any(found):
            return Outcome(0)
        wanted = {_END[self.told], -self.told}
        odd = [code for code in found if code and code not in wanted]
        return Outcome(codes.readable(odd[0]) if odd else _END[self.told])

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.woken.wait(), seconds)

    def _on_signal(self, number: signal.Signals) -> None:
        """Pass it on. A second Ctrl-C ends at once."""
        ranks.send(self.ranks, signal.SIGKILL if self.told == signal.SIGINT == number else number)
        if number in _END and self.told is None:
            say(f"{number.name}: passed to all ranks, which have {self.options.grace:g} s")
            self.told, self.deadline = number, time.monotonic() + self.options.grace
            self.woken.set()


def _lost(dead: list[ranks.Rank]) -> list[ranks.Rank]:
    """Those that a signal ended. Their peers may fail a moment later, with an exception or jax's abort, for they are gone."""
    return [rank for rank in dead if (rank.returncode or 0) < 0 and rank.returncode != -signal.SIGABRT]


def say(text: str) -> None:
    """A line of the launcher's own, beside those of the ranks."""
    print(f"{WHO}: {text}", file=sys.stderr, flush=True)
