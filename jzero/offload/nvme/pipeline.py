"""The traffic of one step: reads run ahead of the update, writes behind it, and neither takes more memory than the pool has.

A bucket holds one lane from the moment its read begins until its write is on the drive. So as many buckets are under way as
there are lanes, and a slow disk holds the update back by itself. Nothing here knows what is computed in between.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jzero.offload.nvme.array import DiskArray, DiskRows
from jzero.offload.nvme.pool import Lane, Pool
from jzero.offload.nvme.shard_file import ShardFile
from jzero.offload.nvme.swap import Swap

Resting = DiskArray | DiskRows
NUM_THREADS = 4  # per direction; one thread reaches half of what a drive can do (docs/log.md has the table)


class Extent(NamedTuple):
    """Some bytes of one file, and where they are in a lane."""

    file: ShardFile
    start: int
    num_bytes: int
    memory: np.ndarray

    @property
    def parts(self) -> list[tuple[int, np.ndarray]]:
        return self.file.parts(self.memory, self.start, self.num_bytes)


class Bucket:
    """Some leaves of one swap, or rows of them, and the lane that they lie in."""

    def __init__(self, leaves: Sequence[Resting], lane: Lane):
        self.leaves, self.lane = tuple(leaves), lane
        views = iter(lane.cut([size for leaf in leaves for _, _, size in leaf.extents]))
        self.rows = [[Extent(*extent, next(views)) for extent in leaf.extents] for leaf in leaves]
        self.reads: list[Future[None]] = []

    @property
    def extents(self) -> list[Extent]:
        return [row for rows in self.rows for row in rows]


class Pipeline:
    """Threads that read and write one swap's buckets through a pool."""

    def __init__(self, swap: Swap, buckets: Sequence[Sequence[Resting]], pool: Pool, step: int):
        self._swap, self._pool, self._step = swap, pool, step
        self._ahead = deque(buckets)  # that nobody reads yet, in order
        self._running: dict[tuple[tuple[int, int], ...], Bucket] = {}
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(NUM_THREADS, "jzero-read")
        self._writers = ThreadPoolExecutor(NUM_THREADS, "jzero-write")
        self._copier = ThreadPoolExecutor(1, "jzero-copy")
        self._finisher = ThreadPoolExecutor(1, "jzero-finish")
        self._finished: list[Future[None]] = []
        self._sums: defaultdict[Path, dict[int, str]] = defaultdict(dict)  # of what is written so far, by offset
        self._advance()

    def _advance(self) -> None:
        """Begin to read as many buckets as there are free lanes."""
        with self._changed:
            while self._ahead and (lane := self._pool.take()) is not None:
                bucket = Bucket(self._ahead.popleft(), lane)
                for extent in bucket.extents:
                    file, sums = extent.file, self._swap.sums(extent.file)
                    for at, part in extent.parts:
                        expected = sums[at // file.part_bytes]
                        bucket.reads.append(self._readers.submit(file.read, self._swap.slot, at, part, expected))
                self._running[_key(bucket.leaves)] = bucket
            self._changed.notify_all()

    def fetch(self, leaves: Sequence[Resting]) -> Bucket:
        """The bucket of these leaves, being read; waits until a lane is free for it."""
        key = _key(leaves)
        with self._changed:
            assert key in self._running or key in map(_key, self._ahead), f"{key} was not announced"
            self._changed.wait_for(lambda: key in self._running)
            return self._running[key]

    def put_back(self, leaves: Sequence[Resting], arrays: Sequence[jax.Array]) -> "Future[None]":
        """Write arrays over a bucket that was fetched. Done when they lie in its lane; the drive is waited for by `finish`."""
        bucket = self._running[_key(leaves)]
        copied = self._copier.submit(self._copy, bucket, list(arrays))
        self._finished.append(self._finisher.submit(self._write, bucket, copied))
        return copied

    def _copy(self, bucket: Bucket, arrays: list[jax.Array]) -> None:
        for array in arrays:
            array.copy_to_host_async()
        jax.block_until_ready(arrays)  # on every device: replicas read the same lane
        for rows, leaf, array in zip(bucket.rows, bucket.leaves, arrays, strict=True):
            for extent, piece in zip(rows, pieces(array, leaf), strict=True):
                fill(extent.memory, piece)
        for array in arrays:
            array.delete()

    def _write(self, bucket: Bucket, copied: "Future[None]") -> None:
        """Every part, then each file's header and the wait for the drive; then the lane is free."""
        try:
            copied.result()
            writes = [(extent.file, self._write_parts(extent)) for extent in bucket.extents]
            ends = []
            for file, parts in writes:
                sums = self._sums[file.path]
                sums |= {at: part.result() for at, part in parts.items()}
                if len(sums) == file.num_parts:
                    found = [sums[at] for at in sorted(sums)]
                    ends.append(self._writers.submit(self._swap.finish, file, found, self._step))
            for end in ends:
                end.result()
        finally:
            with self._changed:
                del self._running[_key(bucket.leaves)]
                self._pool.give(bucket.lane)
            self._advance()

    def _write_parts(self, extent: Extent) -> "dict[int, Future[str]]":
        write, slot = extent.file.write, self._swap.next_slot
        return {at: self._writers.submit(write, slot, at, part) for at, part in extent.parts}

    def finish(self) -> None:
        """Wait until everything is on the drive; the first error is raised."""
        for one in self._finished:
            one.result()
        self.stop()

    def stop(self) -> None:
        """End what is under way and give back the lanes."""
        with self._changed:
            self._ahead.clear()
        for executor in (self._readers, self._copier, self._finisher, self._writers):
            executor.shutdown(cancel_futures=executor is self._readers)
        with self._changed:
            for bucket in self._running.values():
                self._pool.give(bucket.lane)
            self._running.clear()


def _key(leaves: Sequence[Resting]) -> tuple[tuple[int, int], ...]:
    return tuple((leaf.index, leaf.number if isinstance(leaf, DiskRows) else -1) for leaf in leaves)


def pieces(array: jax.Array, leaf: Resting) -> list[np.ndarray]:
    """This process's pieces of an array that is sharded as `leaf`, in the order of its files; waits for them."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [np.asarray(by_device[devices[0]]) for devices in leaf.leaf.shards().values()]


def fill(memory: np.ndarray, piece: np.ndarray) -> None:
    """An array's bytes at the start of a piece of a lane, which may be where they lie already."""
    flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    if flat.size and flat.ctypes.data != memory.ctypes.data:
        memory[: flat.size] = flat


def on_devices(leaf: Resting, rows: Sequence[Extent], sharding: Any) -> jax.Array:
    """A leaf that has been read, as an array in the memory of its devices that `sharding` names.

    On CPU devices it may lie in the lane itself, which is not written to before the update that reads it is done.
    """
    shards = []
    aval = leaf.leaf
    for extent, (bounds, devices) in zip(rows, aval.shards().items(), strict=True):
        shape = [stop - start for start, stop in bounds]
        piece = extent.memory[: extent.num_bytes].view(aval.dtype).reshape(shape)
        places = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        shards += [jax.device_put(piece, place) for place in places]
    return jax.make_array_from_single_device_arrays(aval.shape, sharding, shards)
