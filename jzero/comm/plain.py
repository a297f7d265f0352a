"""Gather and reduce-scatter, said in two ways: by hand inside `shard_map`, or as sharding constraints for the partitioner.

`split` is a value's spec, one entry per dim. Both ways agree on what they mean:

    gather(shard, split)            whole[i] on every device of the axis         wire: (N-1)/N of the whole
    reduce(whole, split, dtype)     sum over the axis, each device its shard     wire: (N-1)/N of the whole, in `dtype`
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Split = tuple[Any, ...]


class Comm(Protocol):
    """How a shard becomes whole and a gradient becomes a shard."""

    @property
    def is_local(self) -> bool: ...  # whether a shard is an array of its own, or the global array under another placement

    def gather(self, shard: jax.Array, split: Split) -> jax.Array: ...
    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array: ...


@dataclass(frozen=True)
class Manual:
    """Inside `shard_map` over `axis`: every value is one device's piece, every collective is written out."""

    axis: str = "data"

    @property
    def is_local(self) -> bool:
        return True

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        return jax.lax.all_gather(shard, self.axis, axis=self._dim(split), tiled=True)

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        return jax.lax.psum_scatter(whole.astype(dtype), self.axis, scatter_dimension=self._dim(split), tiled=True)

    def _dim(self, split: Split) -> int:
        return next(dim for dim, entry in enumerate(split) if entry == self.axis)


@dataclass(frozen=True)
class Auto:
    """Under Auto axes: values are global, a constraint says where they live, and the partitioner finds the collective."""

    mesh: Mesh
    axis: str = "data"

    @property
    def is_local(self) -> bool:
        return False

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        """Said twice, before and after: else the partitioner may gather earlier, before a barrier that keeps two uses apart."""
        return self.place(self.place(shard, split), without(split, self.axis))

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        return self.place(whole.astype(dtype), split)

    def place(self, value: jax.Array, split: Split) -> jax.Array:
        return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, PartitionSpec(*split)))


def without(split: Split, axis: str) -> Split:
    """The split with `axis` gathered and every other axis kept."""

    def keep(entry: Any) -> Any:
        names = tuple(name for name in ((entry,) if isinstance(entry, str) else entry or ()) if name != axis)
        return names[0] if len(names) == 1 else names or None

    return tuple(map(keep, split))
