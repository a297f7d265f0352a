"""The traffic of one step: reads run ahead of the update, writes behind it, and neither takes more memory than the pool has.

A trip holds one lane from the moment its read begins until its write is on the drive, or, where it is only read, until its
arrays are elsewhere. So as many are under way as there are lanes, and a slow disk holds the update back by itself. Nothing here
knows what is computed in between.
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

from jzero.offload.nvme import direct
from jzero.offload.nvme.array import DiskArray, DiskRows
from jzero.offload.nvme.pool import Lane, Pool
from jzero.offload.nvme.shard_file import ShardFile
from jzero.offload.nvme.swap import Swap
from jzero.offload.tier import Trip

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


class Load:
    """What a trip carries: some leaves of one swap, or rows of them, and the lane that they lie in."""

    def __init__(self, trip: Trip, lane: Lane):
        self.trip, self.lane = trip, lane
        every = trip.goes or trip.comes
        views = iter(lane.cut([size for leaf in every for _, _, size in leaf.extents]))
        rows = {_key(leaf): [Extent(file, start, size, next(views)) for file, start, size in leaf.extents] for leaf in every}
        self.coming = [rows[_key(leaf)] for leaf in trip.comes]
        self.going = [rows[_key(leaf)] for leaf in trip.goes]
        self.reads: list[Future[None]] = []


class Pipeline:
    """Threads that read and write one swap's leaves through a pool, trip by trip."""

    def __init__(self, swap: Swap, trips: Sequence[Trip], pool: Pool, step: int):
        self._swap, self._pool, self._step = swap, pool, step
        self._trips = {id(trip): trip for trip in trips}  # keeps them, and so their ids
        self._ahead = deque(trips)  # that nobody reads yet, in order
        self._running: dict[int, Load] = {}
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(NUM_THREADS, "jzero-read")
        self._writers = ThreadPoolExecutor(NUM_THREADS, "jzero-write")
        self._copier = ThreadPoolExecutor(1, "jzero-copy")
        self._finisher = ThreadPoolExecutor(1, "jzero-finish")
        self._finished: list[Future[None]] = []
        self._sums: defaultdict[Path, dict[int, str]] = defaultdict(dict)  # of what is written so far, by offset
        self._advance()

    def _advance(self) -> None:
        """Begin to read for as many trips as there are free lanes."""
        with self._changed:
            while self._ahead and (lane := self._pool.take()) is not None:
                load = Load(self._ahead.popleft(), lane)
                for extent in (extent for rows in load.coming for extent in rows):
                    file, sums = extent.file, self._swap.sums(extent.file)
                    for at, part in extent.parts:
                        expected = sums[at // file.part_bytes]
                        load.reads.append(self._readers.submit(file.read, self._swap.slot(file), at, part, expected))
                self._running[id(load.trip)] = load
            self._changed.notify_all()

    def fetch(self, trip: Trip) -> Load:
        """What a trip carries, being read; waits until a lane is free for it."""
        assert id(trip) in self._trips, "a trip that was not announced"
        with self._changed:
            self._changed.wait_for(lambda: id(trip) in self._running)
            return self._running[id(trip)]

    def release(self, load: Load) -> None:
        """A trip that was only read is over: nobody looks at its lane any more."""
        with self._changed:
            del self._running[id(load.trip)]
            self._pool.give(load.lane)
        self._advance()

    def put_back(self, trip: Trip, arrays: Sequence[jax.Array]) -> "Future[None]":
        """Write arrays over what goes. Done when they lie in the trip's lane; the drive is waited for by `finish`."""
        load = self._running[id(trip)]
        copied = self._copier.submit(self._copy, load, list(arrays))
        self._finished.append(self._finisher.submit(self._write, load, copied))
        return copied

    def _copy(self, load: Load, arrays: list[jax.Array]) -> None:
        for array in arrays:
            array.copy_to_host_async()
        jax.block_until_ready(arrays)  # on every device: replicas read the same lane
        for rows, leaf, array in zip(load.going, load.trip.goes, arrays, strict=True):
            for extent, piece in zip(rows, pieces(array, leaf), strict=True):
                fill(extent.memory, piece)
        for array in arrays:
            array.delete()

    def _write(self, load: Load, copied: "Future[None]") -> None:
        """Every part, then each file's header and the wait for the drive; then the lane is free."""
        try:
            copied.result()
            writes = [(extent.file, self._write_parts(extent)) for rows in load.going for extent in rows]
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
            self.release(load)

    def _write_parts(self, extent: Extent) -> "dict[int, Future[str]]":
        write, slot = extent.file.write, self._swap.next_slot(extent.file)
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
            for load in self._running.values():
                self._pool.give(load.lane)
            self._running.clear()


def _key(leaf: Resting) -> tuple[int, int]:
    return leaf.index, leaf.number if isinstance(leaf, DiskRows) else -1


def lane_bytes(trip: Trip) -> int:
    """What a trip needs of a lane."""
    return sum(direct.padded(size) for leaf in trip.goes or trip.comes for _, _, size in leaf.extents)


def pieces(array: jax.Array, leaf: Resting) -> list[np.ndarray]:
    """This process's pieces of an array that is sharded as `leaf`, in the order of its files; waits for them."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [np.asarray(by_device[devices[0]]) for devices in leaf.leaf.shards().values()]


def fill(memory: np.ndarray, piece: np.ndarray) -> None:
    """An array's bytes at the start of a piece of a lane, which may be where they lie already."""
    flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    if flat.size and flat.ctypes.data != memory.ctypes.data:
        memory[: flat.size] = flat


def on_devices(leaf: Resting, rows: Sequence[Extent], sharding: Any, *, is_copy: bool = False) -> jax.Array:
    """A leaf that has been read, as an array in the memory of its devices that `sharding` names.

    On CPU devices it may lie in the lane itself, which is not written to before the update that reads it is done. With
    `is_copy` it lies in memory of its own there too.
    """
    shards = []
    aval = leaf.leaf
    is_copy = is_copy and next(iter(aval.sharding.device_set)).platform == "cpu"
    for extent, (bounds, devices) in zip(rows, aval.shards().items(), strict=True):
        shape = [stop - start for start, stop in bounds]
        piece = extent.memory[: extent.num_bytes].view(aval.dtype).reshape(shape)
        places = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        shards += [jax.device_put(piece.copy() if is_copy else piece, place) for place in places]
    return jax.make_array_from_single_device_arrays(aval.shape, sharding, shards)
