"""What to do about a job that does not fit: the changes that would make it, each tried by the closed form and not guessed."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jzero.models import MixtralConfig
from jzero.offload import Offload
from jzero.offload.asked import STEP, USE
from jzero.plan import at_use, closed, compiled, hosts, offloads, room
from jzero.plan.job import AXES, BATCH_AXES, Job
from jzero.plan.names import fields_of, said_of
from jzero.plan.room import usable_bytes
from jzero.plan.shapes import tensor_sizes
from jzero.plan.sizes import expert_sizes, sequence_sizes
from jzero.plan.times import times

_MOST_TENSOR = 8  # beyond a host's fast links nobody splits a layer, a sequence or a token's experts
_FRACTIONS = (0.8, 0.6, 0.4, 0.2)
_FOLDER = "/data/swap"  # a name for the command; the folder is the user's


class Change(NamedTuple):
    """One setting changed, and what the closed form then says."""

    flags: str
    peak_bytes: int
    step_s: float
    job: Job
    compiled_peak_bytes: int | None = None  # where it was compiled too

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"job": self.job.to_dict()}


def changes(job: Job, *, limit: int | None = None) -> list[Change]:
    """Settings that would make `job` fit, the fastest first; empty when none of those tried does."""
    limit = usable_bytes(job.target) if limit is None else limit
    tried = [(flags, one) for flags, one in _variants(job) if at_use.refusal(one) is None]
    found = [Change(flags, closed.memory(one).peak_bytes, times(one).step_s, one) for flags, one in tried]
    return sorted((one for one in found if room.fits(one.job, limit, peak=one.peak_bytes)), key=lambda one: one.step_s)


def compiled_changes(found: list[Change], *, limit: int, most: int = 3) -> list[Change]:
    """`found` with its first few compiled until one really fits; those that do not are left out."""
    for number, change in enumerate(found[:most]):
        if offloads.is_blind(change.job):
            return found[number:]
        peak = compiled.compile_job(change.job)["peak_bytes"]
        if peak <= limit:
            return [change._replace(compiled_peak_bytes=peak), *found[number + 1 :]]
    return found[most:]


def _variants(job: Job) -> Iterator[tuple[str, Job]]:
    """One change each, then two at once."""
    single = [*_stages(job), *_meshes(job), *_remats(job), *_accumulations(job), *_offloads(job)]
    yield from ((flags, one) for flags, one in single)
    for flags, one in (*_stages(job), *_meshes(job)):
        for more, two in (*_remats(one), *_accumulations(one), *_offloads(one)):
            yield f"{flags} {more}", two
    for flags, one in _offloads(job):
        for more, two in (*_remats(one), *_accumulations(one)):
            yield f"{flags} {more}", two
    if job.seq >= 2048:
        length = job.seq // 2
        yield f"--seq {length}", job._replace(seq=length, batch=job.batch)


def _stages(job: Job) -> Iterator[tuple[str, Job]]:
    yield from ((f"--stage {stage}", job._replace(stage=stage)) for stage in range(job.stage + 1, 4))


def _meshes(job: Job) -> Iterator[tuple[str, Job]]:
    """What shards more: replicas given to data, or a larger `tensor`, `sequence` or `expert` axis taken from data."""
    for mesh in (_with(job, replica=1, data=job.replica * job.data), *_more_tensor(job), *_more_of_others(job)):
        shards = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
        if mesh != job.mesh and job.batch % (shards * job.accumulate) == 0:
            yield f"--mesh {','.join(f'{axis}={size}' for axis, size in mesh.items())}", job._replace(mesh=mesh)


def _more_tensor(job: Job) -> Iterator[dict[str, int]]:
    for size in tensor_sizes(job.config):
        if size > job.tensor and job.data % (size // job.tensor) == 0 and size % job.tensor == 0 and size <= _MOST_TENSOR:
            yield _with(job, data=job.data // (size // job.tensor), tensor=size)


def _more_of_others(job: Job) -> Iterator[dict[str, int]]:
    if job.pipe > 1:
        return
    every = {"sequence": sequence_sizes(job.model, job.seq, job.tensor), "expert": expert_sizes(job.model)}
    is_mixture = isinstance(job.config, MixtralConfig)
    for axis, legal in every.items():
        now = job.mesh.get(axis, 1)
        for size in legal if is_mixture == (axis == "expert") else ():
            if size > now and size % now == 0 and job.data % (size // now) == 0 and size <= _MOST_TENSOR:
                yield _with(job, data=job.data // (size // now), **{axis: size})


def _offloads(job: Job) -> Iterator[tuple[str, Job]]:
    """What takes more off the device, or from a short host memory to a drive."""
    own = fields_of(job.offload) if job.offload else {}
    both = {"opt_state": "host", "params": "host"}
    wanted: list[dict[str, Any]] = [{"opt_state": "host"}, both, both | {"fetch": USE}]
    on_drive = {"opt_state": f"nvme:{_FOLDER}"}
    wanted += [on_drive, on_drive | {"params": f"nvme:{_FOLDER}", "fetch": STEP}] if hosts.room_of(job).disk_bytes else []
    wanted += [{"fraction": share} for share in _FRACTIONS if "opt_state" in own or "params" in own]
    for fields in wanted:
        asked: dict[str, Any] = own | fields
        offload = Offload(**asked)
        if offload == job.offload or ("fraction" in own and own["fraction"] <= fields.get("fraction", 0)):
            continue
        yield f"--offload {said_of(offload)}", job._replace(offload=offload)


def _with(job: Job, **sizes: int) -> dict[str, int]:
    """The job's mesh with other sizes, in its order."""
    found = {axis: sizes.get(axis, job.mesh.get(axis, 1)) for axis in AXES}
    return {axis: size for axis, size in found.items() if size > 1 or axis == "data"}


def _remats(job: Job) -> Iterator[tuple[str, Job]]:
    """What saves less."""
    order = ("none", "dots", "full")
    saves_elsewhere = job.offload is not None and job.offload.activations
    for remat in order[order.index(job.remat) + 1 :] if job.remat in order and not saves_elsewhere else ():
        yield f"--remat {remat}", job._replace(remat=remat)


def _accumulations(job: Job) -> Iterator[tuple[str, Job]]:
    """The same batch in more microbatches."""
    factor = 2
    while job.micro_sequences % factor == 0:
        yield f"--accumulate {job.accumulate * factor}", job._replace(accumulate=job.accumulate * factor)
        factor *= 2
