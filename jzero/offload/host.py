"""Pinned host memory: leaves at rest are ordinary arrays whose sharding names the memory kind."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import jax

from jzero._errors import columns, explain
from jzero._tree import num_bytes
from jzero.offload.tier import Trip

WHO = "jzero.Offload"
KIND = "pinned_host"
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # 64 by default (xla/pjrt/gpu)


class Copies:
    """Arrays that copies are filling; jax orders every use behind them."""

    def __init__(self, arrays: list[jax.Array], sources: Sequence[jax.Array] = ()):
        self.arrays, self.sources = arrays, sources

    def result(self) -> list[jax.Array]:
        if self.sources:  # leaving: the device memory is wanted back
            jax.block_until_ready(self.arrays)
            for source in self.sources:
                source.delete()
            self.sources = ()
        return self.arrays


class HostTier:
    """`pinned_host` of the devices that a leaf is sharded over."""

    name = KIND

    def check(self, leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]], still: Collection[str] = ()) -> None:
        check_kind(leaves)
        check_room(leaves)

    def is_here(self, leaf: Any, sharding: jax.sharding.Sharding) -> bool:
        return isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding.with_memory_kind(KIND), leaf.ndim)

    def place(self, paths: Sequence[str], leaves: Sequence[Any], shardings: Sequence[Any]) -> list[jax.Array]:
        targets = [sharding.with_memory_kind(KIND) for sharding in shardings]
        return [jax.block_until_ready(copy) for copy in _copied(leaves, targets)]

    can_fail = False

    @property
    def findings(self) -> list[str]:
        return []

    def describe(self) -> dict[str, Any]:
        return {}

    def begin(self, step: int, trips: Sequence[Trip]) -> None:
        pass

    def fetch(self, trip: Trip, shardings: Sequence[Any]) -> Copies:
        return Copies(_copied(trip.comes, shardings))

    def put_back(self, trip: Trip, arrays: Sequence[jax.Array]) -> Copies:
        targets = [array.sharding.with_memory_kind(KIND) for array in arrays]
        return Copies(_copied(arrays, targets), arrays)

    def settle(self) -> None:
        pass

    def end(self) -> None:
        pass

    def undo(self) -> None:
        pass

    def cancel(self) -> None:
        pass


def _copied(leaves: Sequence[Any], shardings: Sequence[Any]) -> list[jax.Array]:
    """Copies that share no buffer: the step donates them, and CPU devices would hand out the source's own."""
    return [jax.device_put(leaf, sharding, may_alias=False) for leaf, sharding in zip(leaves, shardings, strict=True)]


def check_kind(leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]]) -> None:
    """The devices have the memory kind."""
    devices = {device for _, leaf in leaves for device in leaf.sharding.device_set}
    for device in sorted(devices, key=lambda device: device.id)[:1]:  # of a mesh all are alike
        kinds = [memory.kind for memory in device.addressable_memories()]
        if KIND not in kinds:
            found = [f"{device} has {', '.join(kinds) or 'none that it names'}"]
            context = f"{len(leaves)} leaves were to rest there"
            fix = "Leave offload= out on this back end."
            problem = f"this back end has no memory kind {KIND!r}"
            raise NotImplementedError(explain(WHO, problem, found=found, context=context, fix=fix))


def check_room(leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]]) -> None:
    """This process's part of the leaves fits into the host memory that is free, computed from shapes."""
    devices = {device for _, leaf in leaves for device in leaf.sharding.addressable_devices}
    if not devices <= set(jax.devices()):
        return  # only described
    sizes = {path: _bytes_here(leaf) for path, leaf in leaves}
    total = sum(sizes.values())
    largest = columns([path, f"{size:,} bytes"] for path, size in sorted(sizes.items(), key=lambda item: -item[1])[:5])
    context = f"the largest of {len(sizes)} leaves"
    free = free_host_bytes()
    if free is not None and total > free:
        problem = f"the offloaded leaves need {total:,} bytes of host memory in this process, and {free:,} are free"
        fix = f"Offload(fraction={free / total:.2f}) would fit, or opt_state='nvme:FOLDER', or more hosts to share the state."
        raise ValueError(explain(WHO, problem, found=largest, context=context, fix=fix))
    limit = pinned_limit_bytes() if any(device.platform == "gpu" for device in devices) else None
    if limit is not None and total > limit:
        problem = f"the offloaded leaves need {total:,} bytes of pinned memory in this process, and {limit:,} may be pinned"
        fix = f"Set {PINNED_LIMIT}={total // 2**30 + 8} in the environment before jax starts, or a smaller fraction=."
        raise ValueError(explain(WHO, problem, found=largest, context=context, fix=fix))


def pinned_limit_bytes() -> int:
    """How much host memory the CUDA client pins at most."""
    return int(float(os.environ.get(PINNED_LIMIT, 64)) * 2**30)


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
    shard = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return num_bytes(shard) * len(leaf.sharding.addressable_devices)


def free_host_bytes() -> int | None:
    """Host memory that is free, as Linux says; None where it does not."""
    try:
        with open("/proc/meminfo") as lines:
            table = dict(line.split(":", 1) for line in lines)
        return int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
