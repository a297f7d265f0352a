"""Files as a place where leaves of the state rest: placed once, then moved through memory bucket by bucket in every step."""

import secrets
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jzero._errors import columns, explain
from jzero._tree import short
from jzero.offload.nvme import direct
from jzero.offload.nvme import folder as folders
from jzero.offload.nvme.array import DiskArray, DiskRows
from jzero.offload.nvme.pipeline import Load, Pipeline, fill, lane_bytes, on_devices
from jzero.offload.nvme.pool import Pool
from jzero.offload.nvme.shard_file import WHO, CorruptSwap, ShardFile
from jzero.offload.nvme.swap import Leaf, Swap
from jzero.offload.tier import Trip

NUM_LANES = 4  # one is computed; one is read beside it, one is written, and one waits for either
_LIVE: dict[Path, set[str]] = {}  # folder -> names of the swaps that this process made in it


class Arriving:
    """Leaves that are being read. Those that do not go back leave their lane as soon as somebody has asked for them."""

    def __init__(self, load: Load, pipeline: Pipeline, shardings: Sequence[Any]):
        self._load, self._pipeline, self._shardings = load, pipeline, shardings

    def result(self) -> list[jax.Array]:
        load, leaves_lane = self._load, not self._load.trip.goes
        for read in load.reads:
            read.result()
        every = zip(load.trip.comes, load.coming, self._shardings, strict=True)
        arrays = [on_devices(*one, is_copy=leaves_lane) for one in every]
        if leaves_lane:
            jax.block_until_ready(arrays)
            self._pipeline.release(load)
        return arrays


class Leaving:
    """Arrays that are being written. Their device memory is free when they lie in a lane; the disk may take longer."""

    def __init__(self, leaves: list[DiskArray], copied: "Future[None]"):
        self._leaves, self._copied = leaves, copied

    def result(self) -> list[DiskArray]:
        self._copied.result()
        return self._leaves


class NVMeTier:
    """A folder on a drive, for the leaves of one `ShardedStep`."""

    can_fail = True

    def __init__(self, folder: str):
        self.folder = folder
        self.name = f"nvme:{folder}"
        self.findings: list[str] = []
        self.speed: folders.Speed | None = None
        self.pool: Pool | None = None
        self._expected: list[Leaf] = []
        self._placing: Swap | None = None
        self._missing: set[str] = set()
        self._pipeline: Pipeline | None = None
        self._swap: Swap | None = None  # of the step under way
        self._after = 0  # updates made when that step is done
        self._ended: tuple[Swap, int | None] | None = None  # of the step before, and the step that its files were of

    def check(self, leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]], still: Collection[str] = ()) -> None:
        """The folder is ours, writable and large enough, and fast enough or warned about. What is placed next is `leaves`."""
        path = folders.open_for(self.folder)
        self._expected = [Leaf.of(name, aval, aval.sharding, name in still) for name, aval in leaves]
        self._placing = None
        swap = Swap(path / "unmade", self._expected)
        gone = sum(left.num_bytes for left in folders.leftovers(path, _live(path)))
        folders.check_room(path, swap.num_bytes, swap.payload_bytes, gone)
        if self.speed is None:
            with _told(swap, "the swap's disk could not be tried", "Free space, or name a folder on a larger disk."):
                self.speed = folders.measure(path, swap.payload_bytes)
            folders.warn_if_slow(path, self.speed, swap.payload_bytes, swap.written_bytes)

    def describe(self) -> dict[str, Any]:
        """For the report."""
        pool = {"pool_bytes": self.pool.num_bytes, "lanes": self.pool.num_lanes} if self.pool is not None else {}
        return {**pool, **(self.speed._asdict() if self.speed is not None else {})}

    def is_here(self, leaf: Any, sharding: jax.sharding.Sharding) -> bool:
        return (
            isinstance(leaf, DiskArray)
            and leaf.swap.folder.parent == folders.open_for(self.folder)
            and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        )

    def place(self, paths: Sequence[str], leaves: Sequence[Any], shardings: Sequence[Any]) -> list[DiskArray]:
        """Write leaves of a new state. The first call after `check` makes the files; the last leaf of those commits them."""
        swap = self._placing or self._begin_placing()
        index_of = {leaf.path: index for index, leaf in enumerate(swap.leaves)}
        placed = []
        for path, value in zip(paths, leaves, strict=True):
            with _told(swap, "the state could not be placed", "Nothing of it is kept; free space or name another folder."):
                write_whole(swap, index_of[path], value)
            self._missing.discard(path)
            placed.append(DiskArray(swap, index_of[path], 0))
        if not self._missing:
            swap.commit(None)
            self._placing = None
        return placed

    def _begin_placing(self) -> Swap:
        path = folders.open_for(self.folder)
        rows = frozenset((leaf.path, leaf.shape, leaf.dtype.name) for leaf in self._expected)
        removed = folders.take_over(path, _live(path), rows)
        self.findings += [f"the swap folder held what an ended run left, and was taken over: {line}" for line in removed]
        swap = Swap(path / f"{folders.STATE}{secrets.token_hex(4)}", self._expected)
        _LIVE.setdefault(path, set()).add(swap.folder.name)
        with _told(swap, "the swap's files could not be made", "Free space, or name a folder on a larger disk."):
            swap.create()
        self._placing, self._missing = swap, {leaf.path for leaf in self._expected}
        return swap

    def begin(self, step: int, trips: Sequence[Trip]) -> None:
        """Start to read. `step` counts the updates made so far; `trips` are all that will be fetched, in order."""
        self.cancel()
        self._ended = None
        swap = self._swap = _one_swap([leaf for trip in trips for leaf in trip.goes or trip.comes])
        if swap.step is not None and swap.step != step:
            problem = "the state and the swap are of different steps"
            found = [f"the state has made {step} updates, the files in {swap.folder} belong to update {swap.step}"]
            fix = "Use the whole state that the step returned last, or restore a checkpoint."
            raise ValueError(explain(WHO, problem, found=found, fix=fix))
        self._after = step + 1
        size, num_lanes = max(map(lane_bytes, trips)), min(NUM_LANES, len(trips))
        if self.pool is None or self.pool.lane_bytes < size or self.pool.num_lanes < num_lanes:
            self.pool = Pool(num_lanes, size)
        self._pipeline = Pipeline(swap, trips, self.pool, self._after)

    def fetch(self, trip: Trip, shardings: Sequence[Any]) -> Arriving:
        assert self._pipeline is not None
        return Arriving(self._pipeline.fetch(trip), self._pipeline, shardings)

    def put_back(self, trip: Trip, arrays: Sequence[jax.Array]) -> Leaving:
        assert self._pipeline is not None
        copied = self._pipeline.put_back(trip, arrays)
        return Leaving([leaf.after() for leaf in trip.goes], copied)

    def settle(self) -> None:
        """Every write has reached the drive, beside the generation that still counts."""
        assert self._pipeline is not None
        with self._writing():
            self._pipeline.finish()

    def end(self) -> None:
        """The new generation counts from here on, whatever happens."""
        assert self._swap is not None
        swap, before = self._swap, self._swap.step
        with self._writing():
            swap.commit(self._after)
        self._ended = swap, before
        self.cancel()

    def undo(self) -> None:
        """Another place could not keep the step that ended here: the generation before it counts."""
        assert self._ended is not None
        swap, before = self._ended
        swap.take_back(before)
        self._ended = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        assert self._swap is not None
        said = f"The state after {self._after - 1} updates is intact, here and in the files: free space and repeat the step."
        with _told(self._swap, f"update {self._after} could not be written", said):
            yield

    def cancel(self) -> None:
        """Forget the step under way, which failed or was skipped; the generation before it still counts."""
        if self._pipeline is not None:
            self._pipeline.stop()
        self._pipeline = self._swap = None


def _live(path: Path) -> set[str]:
    return {name for name in _LIVE.get(path, set()) if (path / name).exists()}


def _one_swap(leaves: Sequence[DiskArray]) -> Swap:
    """The swap of all these leaves, each of which is of its newest generation."""
    strange = [short(leaf) for leaf in leaves if not isinstance(leaf, DiskArray | DiskRows)]
    if strange:
        fix = "Place the state: state = step.place(state)."
        raise ValueError(explain(WHO, f"{len(strange)} leaves do not rest in files", found=strange[:5], fix=fix))
    for leaf in leaves:
        leaf.check_alive()
    folders_met = {leaf.swap.folder: leaf for leaf in leaves}
    if len(folders_met) > 1:
        rows = [[folder, leaf.path] for folder, leaf in folders_met.items()]
        fix = "Place the state anew: state = step.place(state)."
        raise ValueError(explain(WHO, "leaves of one state lie in the swaps of several", found=columns(rows), fix=fix))
    return leaves[0].swap


def write_whole(swap: Swap, index: int, value: Any) -> None:
    """A leaf of a new state into the next generation, part by part from several threads; waits for the drive."""
    leaf = swap.leaves[index]
    most = max((file.part_bytes for file in swap.files[index]), default=0)
    buffers = [direct.aligned(most) for _ in range(NUM_LANES)]

    def write(file: ShardFile, at: int, flat: np.ndarray) -> str:
        buffer = buffers.pop()
        try:
            fill(buffer, flat)
            return file.write(swap.next_slot(file), at, buffer[: direct.padded(flat.size)])
        finally:
            buffers.append(buffer)

    with ThreadPoolExecutor(NUM_LANES, "jzero-place") as pool:
        for file, piece in zip(swap.files[index], _pieces(value, leaf), strict=True):
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            step = file.part_bytes
            sums = [pool.submit(write, file, at, flat[at : at + step]) for at in range(0, file.num_bytes, step)]
            swap.finish(file, [one.result() for one in sums], None)


def _pieces(value: Any, leaf: Leaf) -> Iterator[np.ndarray]:
    """This process's pieces of a value from anywhere, one at a time, as `leaf` is sharded."""
    if isinstance(value, DiskArray):
        same = value.sharding.is_equivalent_to(leaf.sharding, value.ndim)
        value = value if same else value.read()
    if isinstance(value, jax.Array) and not value.sharding.is_equivalent_to(leaf.sharding, value.ndim):
        value = jax.device_put(value, leaf.sharding)
    for bounds, devices in leaf.shards().items():
        index = tuple(slice(*one) for one in bounds)
        if isinstance(value, jax.Array | DiskArray):
            yield next(np.asarray(shard.data) for shard in value.addressable_shards if shard.device == devices[0])
        else:
            yield np.asarray(value)[index].astype(leaf.dtype, copy=False)


@contextmanager
def _told(swap: Swap, problem: str, fix: str) -> Iterator[None]:
    """Errors of the system as messages that say what is lost (nothing) and what to do."""
    try:
        yield
    except CorruptSwap:
        raise
    except OSError as error:
        met = [f"{type(error).__name__}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")]
        context = f"{swap.folder}: {swap.num_bytes:,} bytes in two generations"
        raise folders.said(error, explain(WHO, problem, found=met, context=context, fix=fix)) from error
