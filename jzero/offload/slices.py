"""Leaves larger than a bucket, updated slice by slice in one program. Only where the update is elementwise, found by tracing.

A leaf of stacked layers, or a vocabulary's, may be a large part of the whole state. Where each element of a group's update
depends on the same element of its leaves alone, a slice of the update is the update of a slice. The program loops over slices:
fetched from host memory, computed, written back in place (to XLA a dynamic slice of a host array is a copy by DMA).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jzero import _compat
from jzero.offload.elementwise import obstacles

TILE = {-2: 16, -1: 128}  # of a TPU's memory: rows of two-byte numbers, and lanes


class Slices(NamedTuple):
    """How a group's leaves are cut."""

    dim: int
    num: int
    size: int  # of one slice along `dim`

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def take(self, value: jax.Array, index: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(value, index * self.size, self.size, self.dim)

    def put(self, value: jax.Array, piece: jax.Array, index: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(value, piece, index * self.size, self.dim)


def cut(
    shape: Sequence[int], shardings: Sequence[NamedSharding], moved_bytes: int, bucket_bytes: int, *, on_tpu: bool = False
) -> Slices | None:  # fmt: skip
    """The fewest equal slices that fit a bucket, along a dim that no axis splits; the first such dim, if it has enough. Where
    none has, the most that there can be. A TPU copies no part of a tile from host memory.
    """
    split = {dim for sharding in shardings for dim, entry in enumerate(sharding.spec) if entry is not None}
    wanted = -(-moved_bytes // bucket_bytes)
    found = []
    for dim in (dim for dim in range(len(shape)) if dim not in split):
        least = TILE[dim - len(shape)] if on_tpu and dim - len(shape) in TILE else 1
        nums = [num for num in range(2, shape[dim] // least + 1) if shape[dim] % (num * least) == 0]
        if nums:
            num = next((num for num in nums if num >= wanted), nums[-1])
            found.append(Slices(dim, num, shape[dim] // num))
    return min(found, key=lambda one: (max(wanted - one.num, 0), one.num > 2 * wanted, one.dim), default=None)


def is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    """Whether each element of the outputs depends on the same element of the arrays, all of one shape, and on scalars."""
    fits = lambda atom: atom.aval.shape in ((), shape)
    return all(map(fits, (*jaxpr.invars, *jaxpr.outvars))) and not any(obstacles(jaxpr))


def evaluate(jaxpr: Any, args: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """An elementwise program on slices of that shape."""
    values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, _compat.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        if eqn.primitive.name == "broadcast_in_dim" and eqn.outvars[0].aval.shape:
            values[eqn.outvars[0]] = jax.lax.broadcast(inputs[0], shape)
            continue
        values |= zip(eqn.outvars, _compat.bind(eqn, inputs), strict=True)
    return list(map(read, jaxpr.outvars))
