"""What to do about a job that does not fit: the changes that would make it, each tried by the closed form and not guessed."""

from collections.abc import Iterator
from typing import NamedTuple

from jzero.plan import closed
from jzero.plan.job import Job
from jzero.plan.room import usable_bytes
from jzero.plan.times import times


class Change(NamedTuple):
    """One setting changed, and what the closed form then says."""

    flags: str
    peak_bytes: int
    step_s: float


def changes(job: Job, *, room: int | None = None) -> list[Change]:
    """Settings that would make `job` fit, the fastest first; empty when none of those tried does."""
    limit = usable_bytes(job.target) if room is None else room
    found = [Change(flags, closed.memory(one).peak_bytes, times(one).step_s) for flags, one in _variants(job)]
    return sorted((one for one in found if one.peak_bytes <= limit), key=lambda one: one.step_s)


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
    if job.replica > 1:
        yield f"--mesh data={job.num_devices}", job._replace(mesh={"data": job.num_devices})


def _remats(job: Job) -> Iterator[tuple[str, Job]]:
    if job.remat != "full":
        yield "--remat full", job._replace(remat="full")


def _accumulations(job: Job) -> Iterator[tuple[str, Job]]:
    """The same batch in more microbatches."""
    factor = 2
    while job.micro_sequences % factor == 0:
        yield f"--accumulate {job.accumulate * factor}", job._replace(accumulate=job.accumulate * factor)
        factor *= 2
