"""What a script calls first: join the job it was started in, whoever started it."""

import jax


def initialize() -> bool:
    """Join the other processes of this job through `jax.distributed`; whether there is a job to join.

    Started by `python -m jzero.launch`, SLURM, Open MPI, GKE or on a TPU pod, jax finds the coordinator by itself. Alone, nothing
    happens. Call it before anything touches a device. A second call does nothing.

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
    return True
