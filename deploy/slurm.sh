#!/usr/bin/env bash
# sbatch deploy/slurm.sh examples/dict.py ...        one process per GPU; jax finds the other processes by SLURM's variables.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# --ntasks-per-node equals --gpus-per-node: jax gives each process the GPU of its local rank.
# --signal=TERM@120 tells all ranks two minutes before the end of the time limit; preemption sends the same signal.
# On SIGTERM ranks agree on a step, save, and exit with 143 (jzero.preemption). srun hands that code on.
# 143 means "not finished": the job goes back into the queue, and the same command resumes from the newest checkpoint.
# Any other code ends the job, so an error is seen and not repeated for ever.
# --kill-on-bad-exit ends all ranks when one dies; --wait gives no grace, for without a peer nothing can be saved.
# JZERO_STEP_TIMEOUT makes a step that hangs dump all stacks and exit with 124.
set -u
export JZERO_STEP_TIMEOUT=600 JAX_ENABLE_PREEMPTION_SERVICE=1
srun --kill-on-bad-exit=1 python "$@"
code=$?
[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
