"""What a job of several processes watches by itself, in every `ShardedStep`: steps that hang, ranks that run something else."""

import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

import jax

from jzero import _compat
from jzero._errors import columns, explain

STEP_TIMEOUT = "JZERO_STEP_TIMEOUT"  # seconds; `python -m jzero.launch --step-timeout` sets it
HANGING = 124  # the exit code, as timeout(1)'s
_POLL_SECONDS = 0.2
_OTHERS_SECONDS = 2.0  # ranks wait for each other, so their clocks run out nearly together: let all of them speak
_LEAST_WAIT_SECONDS = 60.0  # for the other ranks' programs, which compile before they compare
_DEFAULT_WAIT_SECONDS = 600.0


class Watch:
    """One step under way at a time: from its call until its results are there."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._began: float | None = None
        self._results: list[Any] = []
        self._lock = threading.Lock()
        if threading.current_thread() is threading.main_thread():
            faulthandler.enable()  # jax aborts a process whose coordinator is gone: then too
            faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)  # the launcher asks so, of ranks not in a step
        threading.Thread(target=self._run, name="jzero.watch", daemon=True).start()

    def begin(self) -> None:
        """A step is called. A step before it that still runs keeps its own beginning."""
        with self._lock:
            if self._began is None or self._ready():
                self._began, self._results = time.monotonic(), []

    def called(self, results: Any) -> None:
        """The call returned; the step ends when `results`, which nothing donates, are there."""
        with self._lock:
            self._results = [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)]
            if not self._results:
                self._began = None

    def failed(self) -> None:
        """The call raised."""
        with self._lock:
            self._began = None

    def _ready(self) -> bool:
        return bool(self._results) and all(leaf.is_deleted() or leaf.is_ready() for leaf in self._results)

    def _run(self) -> None:
        while True:
            time.sleep(min(_POLL_SECONDS, self.timeout / 5))
            with self._lock:
                if self._began is not None and self._ready():
                    self._began, self._results = None, []
                late = self._began is not None and time.monotonic() - self._began > self.timeout
            if late:
                self._give_up()

    def _give_up(self) -> None:
        print(self._message(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        time.sleep(_OTHERS_SECONDS * (2 if jax.process_index() == 0 else 1))  # without rank 0, the coordinator, all end at once
        os._exit(HANGING)  # a thread that hangs in a collective cannot be ended otherwise

    def _message(self) -> str:
        found = [f"rank {jax.process_index()} of {jax.process_count()}: the stacks of its threads follow"]
        fix = "Look for the rank whose main thread is elsewhere. A slow step: raise --step-timeout."
        return explain("jzero.watch", f"a step did not end within {self.timeout:g} s", found=found, fix=fix)


def from_environment() -> Watch | None:
    """A watch if the launcher, or the user, set JZERO_STEP_TIMEOUT; one per process."""
    timeout = os.environ.get(STEP_TIMEOUT)
    if timeout and not _WATCH:
        _WATCH.append(Watch(float(timeout)))
    return _WATCH[0] if timeout else None


_WATCH: list[Watch] = []
_NUM_COMPARED: Counter[str] = Counter()


def compare_programs(text: str, shapes: str) -> None:
    """Every rank is about to run this program for the first time: raise on all of them if they do not all mean the same one.

    Goes through the key-value store of `jax.distributed`, so it needs no collective, which would hang. Nothing for one process.

    Args:
      text: the lowered program.
      shapes: the batch, as a message shows it.

    Raises:
      ValueError: ranks differ, or one does not come; the odd ones are named.
    """
    if jax.process_count() == 1:
        return
    name = f"jzero/step/{_NUM_COMPARED['step']}"
    _NUM_COMPARED["step"] += 1
    mine = {"shapes": shapes, "program": hashlib.sha256(text.encode()).hexdigest()[:12]}
    _compat.tell(f"{name}/{jax.process_index()}", json.dumps(mine))
    wait = max(float(os.environ.get(STEP_TIMEOUT) or _DEFAULT_WAIT_SECONDS), _LEAST_WAIT_SECONDS)
    deadline = time.monotonic() + wait
    heard = [_compat.hear(f"{name}/{rank}", max(deadline - time.monotonic(), 1.0)) for rank in range(jax.process_count())]
    if len(set(heard)) > 1:
        raise ValueError(_difference(heard, wait))


def _difference(heard: list[str | None], wait: float) -> str:
    (usual, votes), *_ = Counter(heard).most_common()
    rows = []
    for rank, one in enumerate(heard):
        said = {"shapes": f"nothing within {wait:g} s", "program": "none"} if one is None else json.loads(one)
        mark = "" if one == usual and votes > len(heard) / 2 else "<- differs"
        rows.append([f"rank {rank}", f"batch {said['shapes']}", f"program {said['program']}", mark])
    odd = [row[0] for row in rows if row[3]]
    fix = "Give every rank the same code and arguments, and a batch of the same global shape."
    problem = f"{', '.join(odd)} of {len(heard)} would run another step than the rest; together they would hang"
    return explain("jzero.watch", problem, found=columns(rows), context="compared before the first run of a step", fix=fix)
