"""The search: stage x mesh x microbatch x accumulate x remat x offload, pruned by the closed form, the best few compiled."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jzero.models import GPT2Config, MixtralConfig
from jzero.offload import Offload
from jzero.plan import at_use, closed, compiled, facts, machine, room
from jzero.plan import offloads as offloading
from jzero.plan.job import SCHEDULE, Job, divisors
from jzero.plan.room import usable_bytes
from jzero.plan.shapes import tensor_sizes
from jzero.plan.sizes import expert_sizes, sequence_sizes
from jzero.plan.times import times

Tick = Callable[[int, int, str], None]  # done, to do, what is being done

_REMATS = ("none", "dots", "full")
_MICROBATCHES, _ACCUMULATES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
_MOST_TENSOR_TPU, _MOST_PIPE, _MOST_MICROBATCHES = 16, 16, 512
_NUM_ROWS = 8
OFFLOADS = (  # tried beside the job's own
    Offload(opt_state="host"),
    Offload(opt_state="host", params="host"),
    Offload(opt_state="host", params="host", fetch="use"),
)


def candidates(job: Job, *, vary_batch: bool = False) -> Iterator[Job]:
    """Every combination of stage, mesh, microbatch, accumulate and remat; sequence, precision and offload stay the job's.

    The job's batch is split evenly in all ways, or with `vary_batch` follows from microbatch and accumulate. `tensor` and
    `sequence` stay inside what fast links join. `pipe` divides the layers, and has at least two microbatches for each
    stage: with fewer the bubble is a third and more.
    """
    for mesh in meshes(job):
        num_shards = mesh.get("replica", 1) * mesh["data"] * mesh.get("expert", 1)
        pipe = mesh.get("pipe", 1)
        for stage in range(4):
            if stage == 0 and "replica" in mesh:
                continue  # stage 0 repeats everywhere already
            for micro, accumulate in _splits(job, num_shards, pipe, vary_batch=vary_batch):
                batch = micro * accumulate * num_shards
                schedule = (job.schedule or SCHEDULE) if pipe > 1 else None
                for remat in _REMATS if job.offload is None or job.offload.activations is None else ("dots",):
                    one = job._replace(
                        stage=stage, mesh=mesh, batch=batch, accumulate=accumulate, remat=remat, schedule=schedule
                    )
                    if at_use.refusal(one) is None:
                        yield one


def meshes(job: Job) -> Iterator[dict[str, int]]:
    """Every way to spread the devices over the axes that fits the model and the machine. `sequence`, `expert` and `pipe`
    exclude each other, and `replica` stands beside none of the first two.
    """
    together = facts.devices_together(job.parsed)
    most_tensor = together if not facts.is_tpu(job.parsed) else _MOST_TENSOR_TPU
    for tensor in tensor_sizes(job.config):
        if job.num_devices % tensor or tensor > most_tensor or (tensor > 1 and isinstance(job.config, GPT2Config)):
            continue
        for axis, size in _one_more(job, tensor, most_tensor // tensor):
            left, rest = divmod(job.num_devices // tensor, size)
            if rest:
                continue
            for replica in divisors(left) if axis == "pipe" else (1,):
                sizes = {"replica": replica, "data": left // replica, "pipe": 1, "sequence": 1, "tensor": tensor, "expert": 1}
                sizes[axis] *= size
                yield {axis: size for axis, size in sizes.items() if size > 1 or axis == "data"}


def _one_more(job: Job, tensor: int, most: int) -> Iterator[tuple[str, int]]:
    """One of the axes that do not stand beside each other, or none of them."""
    yield "pipe", 1  # size 1: none of them
    if not isinstance(job.config, MixtralConfig):
        yield from (("pipe", size) for size in divisors(job.config.num_layers) if 1 < size <= _MOST_PIPE)
        yield from (("sequence", size) for size in sequence_sizes(job.model, job.seq, tensor) if 1 < size <= most)
    yield from (("expert", size) for size in expert_sizes(job.model) if size > 1)


def _splits(job: Job, num_shards: int, pipe: int, *, vary_batch: bool) -> Iterator[tuple[int, int]]:
    """(sequences per device and microbatch, microbatches)."""
    least = 2 * pipe if pipe > 1 else 1
    if vary_batch:
        counts = _ACCUMULATES if pipe == 1 else [pipe * times for times in _ACCUMULATES if times > 1]
        yield from ((micro, count) for micro in _MICROBATCHES for count in counts)
    elif job.batch % num_shards == 0:
        per_shard = job.batch // num_shards
        yield from ((per_shard // count, count) for count in divisors(per_shard) if least <= count <= _MOST_MICROBATCHES)


def search(
    job: Job,
    *,
    compile_best: int = 2,
    vary_batch: bool = False,
    memory_limit: int | None = None,
    offloads: Sequence[Offload] = OFFLOADS,
    tick: Tick = lambda done, total, said: None,
) -> dict[str, Any]:
    """The rows worth looking at, the fastest first, and the winner.

    Args:
      job: gives sequence, precision and target, and the batch unless it may vary.
      compile_best: of those that fit by the closed form, how many to compile, the fastest first. One that turns out not to fit
        is replaced by the next.
      vary_batch: try microbatches and accumulation of any batch, and compare by tokens per second.
      memory_limit: bytes of this machine's memory for all compiling processes together; None for most of what is free.
      offloads: what to try to rest off the device, beside the job's own setting; nothing where the job says it already.
      tick: called with what is done, what there is to do at least, and a line of progress.
    """
    limit = usable_bytes(job.target)
    jobs = [job, *(job._replace(offload=one) for one in offloads if job.offload is None)]
    every = [
        row_of(one, limit)
        for tried in jobs
        for one in candidates(tried, vary_batch=vary_batch)
        if tried is job or not {"replica", "pipe"} & set(one.mesh)  # which keep more on a device: first those that keep less
    ]
    fitting = sorted((row for row in every if row["fits"]), key=_order)
    shown = _pareto(fitting)[:_NUM_ROWS]
    _compile(shown, limit, compile_best, machine.num_compilers(memory_limit), tick)
    good = [row for row in shown if (row["compiled_peak_bytes"] or row["peak_bytes"]) <= limit]
    winner = next((row for row in good if row["compiled_peak_bytes"]), good[0] if good else None)
    return {"num_candidates": len(every), "num_fitting": len(fitting), "rows": shown, "winner": winner}


def dollars_per_1e9_tokens(price_per_hour: float, tokens_per_s_per_device: float) -> float:
    """`price_per_hour`: dollars for one device."""
    return price_per_hour / 3600 / tokens_per_s_per_device * 1e9


def _compile(rows: list[dict[str, Any]], limit: int, wanted: int, num_workers: int, tick: Tick) -> None:
    """Compile rows from the top, a few at once, until `wanted` of them are known to fit."""
    rows = [row for row in rows if not offloading.is_blind(Job.of(row["job"]))]
    num_good, done, position = 0, 0, 0
    while num_good < wanted and position < len(rows):
        batch = rows[position : position + min(wanted - num_good, num_workers)]
        position += len(batch)
        tick(done, max(wanted, position), f"compiling {' and '.join(_name(row['job']) for row in batch)}")
        with ThreadPoolExecutor(len(batch)) as pool:
            found = list(pool.map(lambda row: compiled.compile_job(Job.of(row["job"])), batch))
        for row, one in zip(batch, found, strict=True):
            row["compiled_peak_bytes"] = one["peak_bytes"]
            num_good += one["peak_bytes"] <= limit
        done = position
    tick(done, max(done, 1), "done")


def _name(job: dict[str, Any]) -> str:
    away = f", offload {job['offload']}" if "offload" in job else ""
    return f"stage {job['stage']}, mesh {job['mesh']}, remat {job['remat']}{away}"


def row_of(job: Job, limit: int) -> dict[str, Any]:
    """A candidate with what the closed form says of it; `limit`: bytes of a device."""
    timed, peak = times(job), closed.memory(job).peak_bytes
    return {
        "job": job.to_dict(), "peak_bytes": peak, "compiled_peak_bytes": None, "step_s": timed.step_s,
        "fits": room.fits(job, limit, peak=peak),
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
