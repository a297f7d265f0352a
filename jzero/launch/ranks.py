"""The processes of one attempt: started together, their lines prefixed by rank, ended together."""

import asyncio
import ctypes
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_COLOURS = (36, 33, 32, 35, 34, 31, 96, 93)  # ANSI foreground
_LONGEST_LINE_BYTES = 1 << 20
_DUMP_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Rank(NamedTuple):
    """One process of the job."""

    number: int
    process: asyncio.subprocess.Process
    echo: asyncio.Task[None]

    @property
    def returncode(self) -> int | None:
        return self.process.returncode


async def start(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[Rank]:
    """One process per environment, each in a session of its own, so that signals reach it through us alone."""
    ranks = []
    for number, environ in enumerate(environments):
        process = await asyncio.create_subprocess_exec(
            *command, env=dict(environ), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            stdin=asyncio.subprocess.DEVNULL, limit=_LONGEST_LINE_BYTES, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        ranks.append(Rank(number, process, asyncio.create_task(_echo(number, process))))
    return ranks


def _die_with_parent() -> None:
    """A launcher that SIGKILL ends leaves no process behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def _echo(number: int, process: asyncio.subprocess.Process) -> None:
    """Lines whole and in order; a line longer than the limit comes in pieces."""
    assert process.stdout is not None
    prefix = f"[{number}] "
    if sys.stdout.isatty():
        prefix = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{prefix}\x1b[0m"
    while True:
        try:
            line = await process.stdout.readuntil(b"\n")
        except asyncio.IncompleteReadError as rest:
            line = rest.partial
        except asyncio.LimitOverrunError as over:
            line = await process.stdout.readexactly(over.consumed)
        if not line:
            return
        sys.stdout.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
        sys.stdout.flush()


def send(ranks: Sequence[Rank], number: int) -> None:
    """A signal to every process that still runs."""
    for rank in alive(ranks):
        rank.process.send_signal(number)


def alive(ranks: Sequence[Rank]) -> list[Rank]:
    return [rank for rank in ranks if rank.returncode is None]


async def dump_stacks(ranks: Sequence[Rank]) -> None:
    """Every rank that still runs writes the Python stacks of its threads, where it watches its steps (`jzero.watch`)."""
    watching = alive(ranks)
    send(watching, signal.SIGUSR2)
    if watching:
        await asyncio.sleep(_DUMP_SECONDS)


async def end(ranks: Sequence[Rank], grace: float) -> None:
    """SIGTERM, then SIGKILL for what is still there after `grace` seconds; returns when all lines are out."""
    send(ranks, signal.SIGTERM)
    await gone(ranks, time.monotonic() + grace)


async def gone(ranks: Sequence[Rank], deadline: float) -> None:
    """Wait for all until `deadline`, then SIGKILL."""
    waits = [asyncio.create_task(rank.process.wait()) for rank in ranks]
    await asyncio.wait(waits, timeout=max(deadline - time.monotonic(), 0.0))
    send(ranks, signal.SIGKILL)
    await asyncio.gather(*waits)
    await asyncio.wait([rank.echo for rank in ranks], timeout=5)  # a grandchild may keep the pipe open
