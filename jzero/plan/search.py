"""The search: stage x mesh x accumulate x remat for a model on a target, pruned by the closed form, the best few compiled."""

from collections.abc import Callable, Iterator
from typing import Any

from jzero.plan import closed, compiled
from jzero.plan.job import Job, divisors
from jzero.plan.room import usable_bytes
from jzero.plan.times import times

_REMATS = ("none", "full")
_NUM_ROWS = 8


def candidates(job: Job) -> Iterator[Job]:
    """Every combination that splits the job's batch evenly; the job's own batch, sequence and precision stay."""
    per_device = job.batch // job.num_devices
    for stage in range(4):
        for replica in divisors(job.num_devices):
            if stage == 0 and replica > 1:
                continue  # stage 0 repeats everywhere already
            data = job.num_devices // replica
            mesh = {"replica": replica, "data": data} if replica > 1 else {"data": data}
            for accumulate in divisors(per_device):
                for remat in _REMATS:
                    yield job._replace(stage=stage, mesh=mesh, accumulate=accumulate, remat=remat)


def search(job: Job, *, compile_best: int = 2, tick: Callable[[str], None] = lambda said: None) -> dict[str, Any]:
    """The rows worth looking at, the fastest first, and the winner.

    Args:
      job: gives batch, sequence, precision and target.
      compile_best: of those that fit by the closed form, how many to compile, the fastest first. One that turns out not to fit
        is replaced by the next.
      tick: called with a line of progress before each compilation.
    """
    limit = usable_bytes(job.target)
    every = [_row(one) for one in candidates(job)]
    fitting = sorted((row for row in every if row["peak_bytes"] <= limit), key=lambda row: (row["step_s"], row["peak_bytes"]))
    shown = _pareto(fitting)[:_NUM_ROWS]
    num_good = 0
    for row in shown:
        if num_good == compile_best:
            break
        tick(f"compiling stage {row['job']['stage']}, mesh {row['job']['mesh']}, remat {row['job']['remat']}")
        row["compiled_peak_bytes"] = compiled.compile_job(Job(**row["job"]))["peak_bytes"]
        num_good += row["compiled_peak_bytes"] <= limit
    good = [row for row in shown if (row["compiled_peak_bytes"] or row["peak_bytes"]) <= limit]
    return {"num_candidates": len(every), "num_fitting": len(fitting), "rows": shown, "winner": good[0] if good else None}


def python_of(job: dict[str, Any]) -> str:
    """The lines to paste."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in job["mesh"].items())
    return "\n".join(
        [
            f'model = jzero.models.build("{job["model"]}")',
            f'train_step = jzero.make_train_step(model.loss, optax.adamw(3e-4), precision="{job["precision"]}", '
            f"accumulate={job['accumulate']})",
            f'step = jzero.shard(train_step, stage={job["stage"]}, mesh=jzero.make_mesh({mesh}), remat="{job["remat"]}")',
            f"# batch: int32[{job['batch']}, {job['seq'] + 1}]",
        ]
    )


def _row(job: Job) -> dict[str, Any]:
    timed = times(job)
    return {
        "job": job.to_dict(), "peak_bytes": closed.memory(job).peak_bytes, "compiled_peak_bytes": None, "step_s": timed.step_s,
        "tokens_per_s_per_device": timed.tokens_per_s_per_device, "mfu": timed.mfu,
    }  # fmt: skip


def _pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows sorted by time, those that need less memory than every faster one."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not kept or row["peak_bytes"] < kept[-1]["peak_bytes"]:
            kept.append(row)
    return kept
