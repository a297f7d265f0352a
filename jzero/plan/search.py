"""The search: stage x mesh x microbatch x accumulate x remat, pruned by the closed form, the best few compiled."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jzero.plan import closed, compiled, machine
from jzero.plan.job import Job, divisors
from jzero.plan.room import usable_bytes
from jzero.plan.times import times

Tick = Callable[[int, int, str], None]  # done, to do, what is being done

_REMATS = ("none", "dots", "full")
_MICROBATCHES, _ACCUMULATES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
_NUM_ROWS = 8


def candidates(job: Job, *, vary_batch: bool = False) -> Iterator[Job]:
    """Every combination of stage, mesh, microbatch, accumulate and remat; sequence and precision stay the job's.

    The job's batch is split evenly in all ways, or with `vary_batch` follows from microbatch and accumulate.
    """
    per_device = job.batch // job.num_devices
    splits = [(per_device // count, count) for count in divisors(per_device)]
    if vary_batch:
        splits = [(micro, count) for micro in _MICROBATCHES for count in _ACCUMULATES]
    for stage in range(4):
        for replica in divisors(job.num_devices):
            if stage == 0 and replica > 1:
                continue  # stage 0 repeats everywhere already
            data = job.num_devices // replica
            mesh = {"replica": replica, "data": data} if replica > 1 else {"data": data}
            for micro, accumulate in splits:
                batch = micro * accumulate * job.num_devices
                for remat in _REMATS:
                    yield job._replace(stage=stage, mesh=mesh, batch=batch, accumulate=accumulate, remat=remat)


def search(
    job: Job,
    *,
    compile_best: int = 2,
    vary_batch: bool = False,
    memory_limit: int | None = None,
    tick: Tick = lambda done, total, said: None,
) -> dict[str, Any]:
    """The rows worth looking at, the fastest first, and the winner.

    Args:
      job: gives sequence, precision and target, and the batch unless it may vary.
      compile_best: of those that fit by the closed form, how many to compile, the fastest first. One that turns out not to fit
        is replaced by the next.
      vary_batch: try microbatches and accumulation of any batch, and compare by tokens per second.
      memory_limit: bytes of this machine's memory for all compiling processes together; None for most of what is free.
      tick: called with what is done, what there is to do at least, and a line of progress.
    """
    limit = usable_bytes(job.target)
    every = [row_of(one) for one in candidates(job, vary_batch=vary_batch)]
    fitting = sorted((row for row in every if row["peak_bytes"] <= limit), key=_order)
    shown = _pareto(fitting)[:_NUM_ROWS]
    _compile(shown, limit, compile_best, machine.num_compilers(memory_limit), tick)
    good = [row for row in shown if (row["compiled_peak_bytes"] or row["peak_bytes"]) <= limit]
    winner = next((row for row in good if row["compiled_peak_bytes"]), good[0] if good else None)
    return {"num_candidates": len(every), "num_fitting": len(fitting), "rows": shown, "winner": winner}


def python_of(job: dict[str, Any]) -> str:
    """The lines to paste."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in job["mesh"].items())
    padded = Job(**job).config.padded_vocab_size
    return "\n".join(
        [
            "import jax",
            "import optax",
            "",
            "import jzero",
            "from jzero import models",
            "",
            f'model = models.build("{job["model"]}", padded_vocab_size={padded})',
            "train_step = jzero.make_train_step(",
            f'    model.loss, optax.adamw(3e-4), precision="{job["precision"]}", accumulate={job["accumulate"]}',
            ")",
            f'step = jzero.shard(train_step, stage={job["stage"]}, mesh=jzero.make_mesh({mesh}), remat="{job["remat"]}")',
            "state = step.init(lambda key: train_step.init(model.init(key)), jax.random.key(0))",
            f"# state, metrics = step(state, tokens), tokens: int32[{job['batch']}, {job['seq'] + 1}]",
        ]
    )


def dollars_per_1e9_tokens(price_per_hour: float, tokens_per_s_per_device: float) -> float:
    """`price_per_hour`: dollars for one device."""
    return price_per_hour / 3600 / tokens_per_s_per_device * 1e9


def _compile(rows: list[dict[str, Any]], limit: int, wanted: int, num_workers: int, tick: Tick) -> None:
    """Compile rows from the top, a few at once, until `wanted` of them are known to fit."""
    num_good, done, position = 0, 0, 0
    while num_good < wanted and position < len(rows):
        batch = rows[position : position + min(wanted - num_good, num_workers)]
        position += len(batch)
        tick(done, max(wanted, position), f"compiling {' and '.join(_name(row['job']) for row in batch)}")
        with ThreadPoolExecutor(len(batch)) as pool:
            found = list(pool.map(lambda row: compiled.compile_job(Job(**row["job"])), batch))
        for row, one in zip(batch, found, strict=True):
            row["compiled_peak_bytes"] = one["peak_bytes"]
            num_good += one["peak_bytes"] <= limit
        done = position
    tick(done, max(done, 1), "done")


def _name(job: dict[str, Any]) -> str:
    return f"stage {job['stage']}, mesh {job['mesh']}, remat {job['remat']}"


def row_of(job: Job) -> dict[str, Any]:
    """A candidate with what the closed form says of it."""
    timed = times(job)
    return {
        "job": job.to_dict(), "peak_bytes": closed.memory(job).peak_bytes, "compiled_peak_bytes": None, "step_s": timed.step_s,
        "tokens_per_s_per_device": timed.tokens_per_s_per_device, "mfu": timed.mfu,
    }  # fmt: skip


def _order(row: dict[str, Any]) -> tuple[float, int]:
    return -row["tokens_per_s_per_device"], row["peak_bytes"]


def _pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows sorted by speed, those that need less memory than every faster one."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not kept or row["peak_bytes"] < kept[-1]["peak_bytes"]:
            kept.append(row)
    return kept
