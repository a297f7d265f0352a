"""SIGTERM: all ranks agree on a step, save once more, and end with a code that schedulers read as "start it again".

preemption = jzero.preemption.watch()          # after jzero.launch.initialize()
for i in range(first, num_steps):
    state, metrics = step(state, batch)
    if preemption.reached(i):
        manager.save(i, state, force=True); manager.wait(); sys.exit(preemption.code)
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jzero.launch.codes import PREEMPTED


class Preemption:
    """Whether this job was told to end. `reached` is called by every rank after every step."""

    code = PREEMPTED

    def __init__(self) -> None:
        self._told = threading.Event()
        self.alone = jax.process_count() == 1
        if self.alone:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def reached(self, i: int) -> bool:
        """Whether step `i` is the one after which all ranks save and end. No collective, no wait on the device.

        With several processes jax's preemption service agrees on the step, whichever of them got the signal: the first that
        none has passed yet. The signal is noticed within a second or so.
        """
        return self._told.is_set() if self.alone else bool(multihost_utils.reached_preemption_sync_point(i))


def watch() -> Preemption:
    """Listen for SIGTERM from now on. Call it in the main thread, after the processes have found each other.

    Raises:
      ValueError: not in the main thread.
    """
    return Preemption()
