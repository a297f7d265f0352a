"""What a job may have of each place, and what it needs there."""

from typing import Any, NamedTuple

from jzero.offload.asked import HOST, NVME
from jzero.plan import closed, hosts, offloads
from jzero.plan.job import Job
from jzero.topology import memory_bytes

# CUDA's context and libraries, XLA's own reserve: what a program cannot have. jax takes 75% of a GPU unless told otherwise
# (XLA_PYTHON_CLIENT_MEM_FRACTION); 95% is what it can be told. libtpu reserves a few hundred MB of each chip.
USABLE = 0.95


class Need(NamedTuple):
    """Of one place, per device."""

    need: int
    have: int

    @property
    def fits(self) -> bool:
        return self.need <= self.have

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "missing": max(0, self.need - self.have)}


def usable_bytes(target: str) -> int:
    """Of the memory of one device of `target`, what a program can have."""
    return int(memory_bytes(target) * USABLE)


def needs(job: Job) -> dict[str, Need]:
    """`"host"` and `"disk"`, where the job uses them: needed, and the device's share of its host."""
    found = offloads.away(job)
    if found is None:
        return {}
    room, places = hosts.room_of(job), offloads.places_of(job)
    every = {"host": Need(found.host_bytes, room.host_bytes)} if HOST in places or NVME in places else {}
    return every | ({"disk": Need(found.disk_bytes, room.disk_bytes)} if NVME in places else {})


def fits(job: Job, limit: int, *, peak: int | None = None) -> bool:
    """On the device (`limit` bytes of it, by the closed form unless `peak` says otherwise), in host memory and on disk."""
    on_device = closed.memory(job).peak_bytes if peak is None else peak
    return on_device <= limit and all(one.fits for one in needs(job).values())
