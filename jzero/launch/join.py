"""What a script calls first: join the job it was started in, whoever started it."""

import os
import sys
from types import TracebackType

import jax


def initialize() -> bool:
    """Join the other processes of this job through `jax.distributed`; whether there is a job to join.

    Started by `python -m jzero.launch`, SLURM, Open MPI, GKE or on a TPU pod, jax finds the coordinator by itself. Alone,
    nothing happens. Call it before anything touches a device. A second call does nothing. From then on an uncaught
    exception ends this process at once, without jax's wait for the others.

    Raises:
      RuntimeError: the coordinator cannot be reached.
    """
    if jax.distributed.is_initialized():
        return True
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        return False
    sys.excepthook = _fail_at_once
    return True


def _fail_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An uncaught exception ends the process now: jax's own exit would first wait minutes for ranks that wait for this one."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)
