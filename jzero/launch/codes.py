"""Exit codes, chosen so that schedulers understand them without being told."""

import signal

from jzero.watch import HANGING

USAGE = 2
PREEMPTED = 128 + signal.SIGTERM  # 143: what Kubernetes, SLURM and shells already read as "ended by SIGTERM": start it again
INTERRUPTED = 128 + signal.SIGINT
FAILED_TO_STEP = HANGING  # a step did not end within --step-timeout


def readable(returncode: int) -> int:
    """A process's return code as a shell gives it: 137 for a process that SIGKILL ended (Python says -9)."""
    return 128 - returncode if returncode < 0 else returncode


def describe(returncode: int) -> str:
    """`was ended by SIGKILL`, `ended with code 1`."""
    return f"was ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
