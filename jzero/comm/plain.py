"""Gather and reduce-scatter, said in two ways: by hand inside `shard_map`, or as sharding constraints for the partitioner.

`split` is a value's spec, one entry per dim. Both ways agree on what they mean:

    gather(shard, split)            whole[i] on every device of the axis         wire: (N-1)/N of the whole
    reduce(whole, split, dtype)     sum over the axis, each device its shard     wire: (N-1)/N of the whole, in `dtype`
"""

import math
from collections.abc import Callable, Sequence
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

    `also`: Auto axes that ZeRO shards over too, on dims of their own or behind `axis` on its dim. Over them the partitioner
    gathers, after `axis` and so from pieces, and reduces before it: neither parameter nor gradient crosses `axis` whole.

    `widens`: sums of bfloat16 are said in float32. XLA:CPU does that to all of them, and ends the process where Auto axes stand
    beside the manual ones (jax 0.11.2).
    """

    widens: bool = False
    also: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return True

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        dim, axes = _zero(split)
        if dim is None:
            return self._with_others(shard, split)
        behind = without(split[dim : dim + 1])
        gather = partial(jax.lax.all_gather, axis_name=axes, axis=dim, tiled=behind == (None,))
        inside = (*split[:dim], *behind, *split[dim + 1 :])
        if behind == (None,):
            return self._with_others(self._piece_by_piece(gather, shard, inside, inside), inside)
        stacked = (*split[:dim], None, *behind, *split[dim + 1 :])  # a new dim for those axes, outside what lies behind them
        pieces = self._with_others(self._piece_by_piece(gather, shard, inside, stacked), stacked)
        return pieces.reshape(*shard.shape[:dim], -1, *shard.shape[dim + 1 :])

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        """Over `also` said in two steps, whole and then split, which compilers make a reduce-scatter of. Said in one, the
        partitioner makes the product that ends in `whole` from gathered activations, and sums nothing.
        """
        (dim, axes), whole = _zero(split), self._with_others(whole.astype(self.sum_dtype(dtype)), split)
        if dim is None:
            return self._place(whole, split).astype(dtype)
        behind = without(split[dim : dim + 1])
        scatter = partial(jax.lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=behind == (None,))
        inside = (*split[:dim], *behind, *split[dim + 1 :])
        if behind == (None,):
            return self._piece_by_piece(scatter, whole, inside, inside).astype(dtype)
        num = math.prod(map(jax.lax.axis_size, axes))
        stacked = (*split[:dim], None, *behind, *split[dim + 1 :])
        pieces = whole.reshape(*whole.shape[:dim], num, -1, *whole.shape[dim + 1 :])
        return self._piece_by_piece(scatter, pieces, stacked, inside).astype(dtype)

    def _with_others(self, value: jax.Array, split: Split) -> jax.Array:
        """Whole over `also`, where each device would otherwise go on with its piece."""
        mesh = jax.sharding.get_abstract_mesh()
        if all(mesh.shape.get(name, 1) == 1 for name in self.also):
            return value
        return self._place(value, without(split, self.also))

    def _place(self, value: jax.Array, split: Split) -> jax.Array:
        """A constraint; of an axis that does not divide its dim, nothing."""
        mesh = jax.sharding.get_abstract_mesh()
        entries = [
            entry if size % _num_parts(entry, mesh) == 0 else None for entry, size in zip(split, value.shape, strict=True)
        ]
        return jax.lax.with_sharding_constraint(value, PartitionSpec(*entries))

    def sum_dtype(self, dtype: Any) -> Any:
        """What a sum that was asked for in `dtype` is computed and sent in."""
        return jnp.float32 if self.widens and jnp.dtype(dtype) == jnp.bfloat16 else dtype

    def _piece_by_piece(
        self, collective: Callable[[jax.Array], jax.Array], value: jax.Array, before: Split, after: Split
    ) -> jax.Array:
        """The collective on each piece by itself, given how the value and the result are split over axes that are Auto here."""
        mesh = jax.sharding.get_abstract_mesh()
        odd = {entry for entry, size in zip(before, value.shape, strict=True) if size % _num_parts(entry, mesh)}
        ins, outs = ([None if entry in odd else entry for entry in split] for split in (before, after))
        axes = frozenset(name for entry in ins for name in names(entry))
        if not axes:
            return collective(value)
        specs = PartitionSpec(*ins), PartitionSpec(*outs)
        return jax.shard_map(collective, in_specs=specs[0], out_specs=specs[1], axis_names=axes, check_vma=False)(value)


def _zero(split: Split) -> tuple[int | None, tuple[str, ...]]:
    """The dim that ZeRO's batch axes split, and which; none if only other axes split the value."""
    return next(((dim, found) for dim, entry in enumerate(split) if (found := zero_axes(entry))), (None, ()))


@dataclass(frozen=True)
class Auto:
    """Under Auto axes: values are global, a constraint says where they live, and the partitioner finds the collective."""

    mesh: Mesh
    also: tuple[str, ...] = ()  # axes that ZeRO shards over too: gathered after the others, from pieces

    @property
    def is_local(self) -> bool:
        return False

    def gather(self, shard: jax.Array, split: Split) -> jax.Array:
        """Said twice, before and after: else the partitioner may gather earlier, before a barrier that keeps two uses apart."""
        value = self.place(shard, split)
        for apart in ((), *((name,) for name in self.also)):
            if (next_split := without(split, apart)) != split:
                split = next_split
                value = self.place(value, split)
        return value

    def reduce(self, whole: jax.Array, split: Split, dtype: Any) -> jax.Array:
        return self.place(whole.astype(dtype), split)

    def place(self, value: jax.Array, split: Split) -> jax.Array:
        return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, PartitionSpec(*split)))


def without(split: Split, also: Sequence[str] = ()) -> Split:
    """The split with ZeRO's batch axes gathered, and those named, and every other axis kept."""
    return tuple(entry_of(tuple(name for name in without_zero(entry) if name not in also)) for entry in split)


def _num_parts(entry: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in names(entry))
