"""A leaf that rests in files: an array-like of the state's pytree, read when somebody wants its numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from numpy.lib.mixins import NDArrayOperatorsMixin

from jzero._errors import explain
from jzero.offload.nvme import direct
from jzero.offload.nvme.shard_file import WHO, ShardFile
from jzero.offload.nvme.swap import Leaf, Swap


class DiskShard(NamedTuple):
    """One piece of a leaf on disk; `data` reads it."""

    array: "DiskArray"
    file: ShardFile
    index: tuple[slice, ...]
    device: Any  # that it belongs to
    replica_id: int

    @property
    def data(self) -> np.ndarray:
        return self.array.read_shard(self.file)


class DiskArray(NDArrayOperatorsMixin):
    """A leaf of the state whose numbers lie in files of a swap: one generation of them.

    It has `shape`, `dtype`, `sharding` (of the array it becomes) and `files`, and is a leaf for `jax.tree.map`. `read()` gives
    the `jax.Array`; numpy and operators (`leaf * 2`) read by themselves; jax's functions want `jax.numpy.array(leaf)`. When a
    step has written the next generation, this one is gone, as a donated array is.
    """

    weak_type, committed = False, True
    is_fully_addressable = property(lambda self: self.sharding.is_fully_addressable)

    def __init__(self, swap: Swap, index: int, generation: int):
        self._swap, self._index, self.generation = swap, index, generation

    @property
    def leaf(self) -> Leaf:
        return self._swap.leaves[self._index]

    @property
    def swap(self) -> Swap:
        return self._swap

    @property
    def index(self) -> int:
        """Of the leaf within its swap."""
        return self._index

    @property
    def path(self) -> str:
        """The leaf's name in the state."""
        return self.leaf.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def sharding(self) -> Any:
        return self.leaf.sharding

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def files(self) -> list[Path]:
        """Where this process's pieces lie."""
        return [file.path for file in self._swap.files[self._index]]

    def is_deleted(self) -> bool:
        """Whether a step has replaced these numbers."""
        return self.generation != self._swap.generation_of(self._index)

    def check_alive(self) -> None:
        if self.is_deleted():
            met = f"{self.path} of generation {self.generation}, the files hold generation {self._swap.generation}"
            fix = "Use the state that the step returned: state, aux = step(state, batch)."
            raise RuntimeError(explain(WHO, "this leaf was donated to a step already", found=[met], fix=fix))

    def read_shard(self, file: ShardFile) -> np.ndarray:
        """One piece, verified: an array of its own."""
        self.check_alive()
        memory = direct.aligned(file.num_bytes)
        for (at, part), expected in zip(file.parts(memory), self._swap.sums(file), strict=True):
            file.read(self._swap.slot(file), at, part, expected)
        self.check_alive()  # a step may have run beside this
        shape = [stop - start for start, stop in file.about["shard"]]
        return memory[: file.num_bytes].view(self.dtype).reshape(shape)

    @property
    def extents(self) -> list[tuple[ShardFile, int, int]]:
        """For each file the bytes of its payload that this is: `(file, start, number)`."""
        return [(file, 0, file.num_bytes) for file in self._swap.files[self._index]]

    def after(self) -> "DiskArray":
        """The same leaf of the generation that a step is about to write."""
        return DiskArray(self._swap, self._index, self.generation + 1)

    def part(self, number: int, num_parts: int) -> "DiskRows":
        """Rows of dim 0, which no axis splits: part `number` of `num_parts` equal ones."""
        return DiskRows(self, number, num_parts)

    @property
    def addressable_shards(self) -> list[DiskShard]:
        return list(self._shards())

    def _shards(self) -> Iterator[DiskShard]:
        for file, (bounds, devices) in zip(self._swap.files[self._index], self.leaf.shards().items(), strict=True):
            for number, device in enumerate(devices):
                yield DiskShard(self, file, tuple(slice(*one) for one in bounds), device, number)

    def read(self, memory_kind: str | None = None) -> jax.Array:
        """The numbers as an array: on the devices, or in another memory of theirs (`"pinned_host"`)."""
        sharding = self.sharding if memory_kind is None else self.sharding.with_memory_kind(memory_kind)
        read = {shard.file.path: shard.data for shard in self._shards() if not shard.replica_id}
        places = [SingleDeviceSharding(shard.device, memory_kind=memory_kind) for shard in self._shards()]
        files = [shard.file.path for shard in self._shards()]
        pieces = [jax.device_put(read[file], place) for file, place in zip(files, places, strict=True)]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, pieces)

    def __jax_array__(self) -> jax.Array:
        return self.read()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self.is_fully_addressable:
            fix = "jax.numpy.array(leaf) makes the global array; addressable_shards are this process's pieces."
            raise RuntimeError(explain(WHO, "other processes hold pieces of this leaf", found=[repr(self)], fix=fix))
        whole = np.empty(self.shape, self.dtype)
        for shard in self._shards():
            if not shard.replica_id:
                whole[shard.index] = shard.data
        return whole if dtype is None else whole.astype(dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Operators compute on what is read, as jax arrays."""
        if method != "__call__" or options or not hasattr(jnp, ufunc.__name__):
            return NotImplemented
        return getattr(jnp, ufunc.__name__)(*(one.read() if isinstance(one, DiskArray) else one for one in inputs))

    def __getitem__(self, index: Any) -> jax.Array:
        return self.read()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __float__(self) -> float:
        return float(np.asarray(self))

    def __int__(self) -> int:
        return int(np.asarray(self))

    def __bool__(self) -> bool:
        return bool(np.asarray(self))

    def block_until_ready(self) -> "DiskArray":
        return self

    def __repr__(self) -> str:
        gone = ", donated" if self.is_deleted() else ""
        kind = f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
        return f"DiskArray({self.path} {kind} in {self._swap.folder}, generation {self.generation}{gone})"


@dataclass(frozen=True)
class DiskRows:
    """Some rows of a leaf on disk, as a step fetches and writes them where the whole leaf is too large."""

    whole: DiskArray
    number: int
    num_parts: int

    @property
    def swap(self) -> Swap:
        return self.whole.swap

    @property
    def index(self) -> int:
        return self.whole.index

    @property
    def generation(self) -> int:
        return self.whole.generation

    @property
    def leaf(self) -> Leaf:
        leaf = self.whole.leaf
        return leaf._replace(shape=(leaf.shape[0] // self.num_parts, *leaf.shape[1:]))

    @property
    def path(self) -> str:
        return self.whole.path

    @property
    def extents(self) -> list[tuple[ShardFile, int, int]]:
        sizes = [(file, file.num_bytes // self.num_parts) for file in self.swap.files[self.index]]
        return [(file, self.number * size, size) for file, size in sizes]

    def check_alive(self) -> None:
        self.whole.check_alive()

    def after(self) -> "DiskRows":
        return replace(self, whole=self.whole.after())
