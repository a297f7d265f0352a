"""What to do about a job that does not fit: the changes that would make it, each tried by the closed form and not guessed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jzero.plan import closed, compiled
from jzero.plan.job import AXES, Job
from jzero.plan.room import usable_bytes
from jzero.plan.shapes import tensor_sizes
from jzero.plan.times import times

_MOST_TENSOR = 8  # beyond a host's fast links nobody splits a layer


class Change(NamedTuple):
    """One setting changed, and what the closed form then says."""

    flags: str
    peak_bytes: int
    step_s: float
    job: Job
    compiled_peak_bytes: int | None = None  # where it was compiled too

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"job": self.job.to_dict()}


def changes(job: Job, *, room: int | None = None) -> list[Change]:
    """Settings that would make `job` fit, the fastest first; empty when none of those tried does."""
    limit = usable_bytes(job.target) if room is None else room
    found = [Change(flags, closed.memory(one).peak_bytes, times(one).step_s, one) for flags, one in _variants(job)]
    return sorted((one for one in found if one.peak_bytes <= limit), key=lambda one: one.step_s)


def compiled_changes(found: list[Change], *, room: int, most: int = 3) -> list[Change]:
    """`found` with its first few compiled until one really fits; those that do not are left out."""
    for number, change in enumerate(found[:most]):
        peak = compiled.compile_job(change.job)["peak_bytes"]
        if peak <= room:
            return [change._replace(compiled_peak_bytes=peak), *found[number + 1 :]]
    return found[most:]


def _variants(job: Job) -> Iterator[tuple[str, Job]]:
    """One change each, then two at once."""
    single = [*_stages(job), *_meshes(job), *_remats(job), *_accumulations(job)]
    yield from ((flags, one) for flags, one in single)
    for flags, one in (*_stages(job), *_meshes(job)):
        for more, two in (*_remats(one), *_accumulations(one)):
            yield f"{flags} {more}", two
    if job.seq >= 2048:
        length = job.seq // 2
        yield f"--seq {length}", job._replace(seq=length, batch=job.batch)


def _stages(job: Job) -> Iterator[tuple[str, Job]]:
    yield from ((f"--stage {stage}", job._replace(stage=stage)) for stage in range(job.stage + 1, 4))


def _meshes(job: Job) -> Iterator[tuple[str, Job]]:
    """What shards more: replicas given to data, or a larger `tensor` axis taken from data."""
    for mesh in (_with(job, replica=1, data=job.num_shards), *_more_tensor(job)):
        if mesh != job.mesh and job.batch % (mesh.get("replica", 1) * mesh["data"] * job.accumulate) == 0:
            yield f"--mesh {','.join(f'{axis}={size}' for axis, size in mesh.items())}", job._replace(mesh=mesh)


def _more_tensor(job: Job) -> Iterator[dict[str, int]]:
    for size in tensor_sizes(job.config):
        if size > job.tensor and job.data % (size // job.tensor) == 0 and size % job.tensor == 0 and size <= _MOST_TENSOR:
            yield _with(job, data=job.data // (size // job.tensor), tensor=size)


def _with(job: Job, **sizes: int) -> dict[str, int]:
    """The job's mesh with other sizes, in its order."""
    found = {axis: sizes.get(axis, job.mesh.get(axis, 1)) for axis in AXES}
    return {axis: size for axis, size in found.items() if size > 1 or axis == "data"}


def _remats(job: Job) -> Iterator[tuple[str, Job]]:
    """What saves less."""
    order = ("none", "dots", "full")
    yield from ((f"--remat {remat}", job._replace(remat=remat)) for remat in order[order.index(job.remat) + 1 :])


def _accumulations(job: Job) -> Iterator[tuple[str, Job]]:
    """The same batch in more microbatches."""
    factor = 2
    while job.micro_sequences % factor == 0:
        yield f"--accumulate {job.accumulate * factor}", job._replace(accumulate=job.accumulate * factor)
        factor *= 2
