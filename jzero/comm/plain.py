"""Gather and reduce-scatter, said in two ways: by hand inside `shard_map`, or as sharding constraints for the partitioner.

`split` is a value's spec, one entry per dim. Both ways agree on what they mean:

    gather(shard, split)            whole[i] on every device of the axis         wire: (N-1)/N of the whole
    reduce(whole, split, dtype)     sum over the axis, each device its shard     wire: (N-1)/N of the whole, in `dtype`
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jzero._specs import entry_of, names, without_zero, zero_axes

Split = tuple[Any, ...]


class Comm(Protocol):
    """How a shard becomes whole and a gradient becomes a shard."""

    @property
    def is_local(self) -> bool: ...  # whether a shard is an array of its own, or the global array under another placement

    def gather(self, shard: jax.Array, split: Split) -> jax.Array: ...
    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array: ...


@dataclass(frozen=True)
class Manual:
    """Inside `shard_map` over ZeRO's axes: every value is one device's piece, every collective is written out.

    A split may also name axes that are Auto there (`tensor`): each of their devices then sends its own piece. Left to the
    partitioner, a value split over `tensor` is first gathered whole for a collective over `data`, and split again after it.

    `widens`: sums of bfloat16 are said in float32. XLA:CPU does that to all of them, and ends the process where Auto axes stand
    beside the manual ones (jax 0.11.2).
    """

    widens: bool = False

    @property
    def is_local(self) -> bool:
        return True

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        dim, axes = _zero(split)
        gather = partial(jax.lax.all_gather, axis_name=axes, axis=dim, tiled=True)
        return self._piece_by_piece(gather, shard, split)

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        dim, axes = _zero(split)
        scatter = partial(jax.lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=True)
        return self._piece_by_piece(scatter, whole.astype(self.sum_dtype(dtype)), split).astype(dtype)

    def sum_dtype(self, dtype: Any) -> Any:
        """What a sum that was asked for in `dtype` is computed and sent in."""
        return jnp.float32 if self.widens and jnp.dtype(dtype) == jnp.bfloat16 else dtype

    def _piece_by_piece(self, collective: Callable[[jax.Array], jax.Array], value: jax.Array, split: Split) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        entries = [None if zero_axes(entry) else entry for entry in split]
        dims = zip(entries, value.shape, strict=True)
        spec = [entry if size % _num_parts(entry, mesh) == 0 else None for entry, size in dims]
        axes = frozenset(name for entry in spec for name in names(entry))
        if not axes:
            return collective(value)
        place = PartitionSpec(*spec)
        return jax.shard_map(collective, in_specs=place, out_specs=place, axis_names=axes, check_vma=False)(value)


def _zero(split: Split) -> tuple[int, tuple[str, ...]]:
    """The dim that ZeRO splits, and over which axes."""
    return next((dim, found) for dim, entry in enumerate(split) if (found := zero_axes(entry)))


@dataclass(frozen=True)
class Auto:
    """Under Auto axes: values are global, a constraint says where they live, and the partitioner finds the collective."""

    mesh: Mesh

    @property
    def is_local(self) -> bool:
        return False

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        """Said twice, before and after: else the partitioner may gather earlier, before a barrier that keeps two uses apart."""
        return self.place(self.place(shard, split), without(split))

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        return self.place(whole.astype(dtype), split)

    def place(self, value: jax.Array, split: Split) -> jax.Array:
        return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, PartitionSpec(*split)))


def without(split: Split) -> Split:
    """The split with ZeRO's axes gathered and every other axis kept."""
    return tuple(entry_of(without_zero(entry)) for entry in split)


def _num_parts(entry: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in names(entry))
