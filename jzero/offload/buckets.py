"""What is updated together: groups of leaves that depend on each other, packed until a bucket is full."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jzero import _compat
from jzero.offload.host import KIND

DEFAULT_BYTES = 256 * 2**20  # where nothing can be measured: devices that are only described, several processes
PROBE_BYTES = 16 * 2**20
LATENCY_SHARE = 0.02  # of a bucket's time on the link, what starting a copy may cost
MEMORY_SHARE = 0.125  # of a device's free memory, what one bucket may take: two are there at a time


class Bucket(NamedTuple):
    """Leaves of the state by their numbers: what is updated together, and what of it has to be moved."""

    params: tuple[int, ...]
    opt_state: tuple[int, ...]
    moved_bytes: int  # per device, one way; where the host updates, the memory that it takes there or on the device
    on_host: bool = False  # whether the host updates it


def pack(groups: Sequence[Bucket], bucket_bytes: int) -> list[Bucket]:
    """Groups in order, as many to a bucket as fit. What moves nothing comes first; then what is larger than a bucket, each by
    itself: it may come slice by slice, when nothing else is there. Last what the host updates, likewise.
    """
    of_host = [group for group in groups if group.on_host]
    if of_host and len(of_host) < len(groups):
        return [*pack([group for group in groups if not group.on_host], bucket_bytes), *pack(of_host, bucket_bytes)]
    still = [group for group in groups if not group.moved_bytes]
    packed = [_joined(still)] if still else []
    current: list[Bucket] = []
    large = [group for group in groups if group.moved_bytes > bucket_bytes]
    for group in (group for group in groups if 0 < group.moved_bytes <= bucket_bytes):
        if current and sum(one.moved_bytes for one in current) + group.moved_bytes > bucket_bytes:
            packed.append(_joined(current))
            current = []
        current.append(group)
    return [*packed, *([_joined(current)] if current else []), *large]


def _joined(groups: Sequence[Bucket]) -> Bucket:
    params, opt_state, sizes, on_host = zip(*groups, strict=True)
    return Bucket(tuple(sorted(sum(params, ()))), tuple(sorted(sum(opt_state, ()))), sum(sizes), all(on_host))


def default_bytes(mesh: Mesh) -> int:
    """The size at which starting a copy costs `LATENCY_SHARE` of it, as measured, if an eighth of the free memory holds it."""
    devices = mesh.devices.flat
    if jax.process_count() > 1 or not set(devices) <= set(jax.devices()):
        return DEFAULT_BYTES  # every process must cut alike
    latency, bandwidth = measure(mesh)
    wanted = int(latency * bandwidth / LATENCY_SHARE)
    free = [_free(device) for device in devices]
    limit = min((size for size in free if size is not None), default=None)
    return max(wanted if limit is None else min(wanted, int(limit * MEMORY_SHARE)), 1)


def measure(mesh: Mesh) -> tuple[float, float]:
    """Seconds that a small copy to the host takes, and bytes per second and device of a large one: the best of three."""
    sharding = NamedSharding(mesh, PartitionSpec())
    host = sharding.with_memory_kind(KIND)

    def seconds(size: int) -> float:
        array = jax.block_until_ready(jax.device_put(jnp.zeros(size, jnp.uint8), sharding))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(jax.device_put(array, host))
            times.append(time.perf_counter() - start)
        return min(times)

    latency = seconds(8)
    return latency, PROBE_BYTES / max(seconds(PROBE_BYTES) - latency, 1e-6)


def measure_host(mesh: Mesh) -> float:
    """Bytes per second and device that the host's processors read and write in an update like Adam's: the best of three.

    All devices' pieces at once, as in a step: those of one host share its processors.
    """
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names), memory_kind=KIND)
    zeros = np.zeros(PROBE_BYTES // 4 * mesh.size, np.float32)
    arrays = [jax.block_until_ready(jax.device_put(zeros, spread, may_alias=False)) for _ in range(4)]
    program = jax.jit(_probe, in_shardings=[spread] * 4, out_shardings=[spread] * 4, donate_argnums=(0, 1, 2, 3))
    times = []
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        arrays = jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - start)
    return 7 * PROBE_BYTES / min(times[1:])


def _probe(*arrays: jax.Array) -> list[jax.Array]:
    """A parameter, its moments and its gradient: four are read, three written."""

    def adam(param: jax.Array, first: jax.Array, second: jax.Array, grad: jax.Array) -> list[jax.Array]:
        first, second = 0.9 * first + 0.1 * grad, 0.99 * second + 0.01 * grad * grad
        return [param - 1e-3 * first / (jnp.sqrt(second) + 1e-8), first, second]

    return [*_compat.on_host(adam, arrays, [jax.memory.Space.Host] * 3), arrays[3]]


def _free(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
