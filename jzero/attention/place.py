"""Where activations lie: what the mesh in force says of an axis, and which of its axes attention may split by hand."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jzero._types import BATCH_AXES

TENSOR = "tensor"


class Place(NamedTuple):
    """Of arrays [batch, length, heads, head_dim]: the axes of each dim, to be manual while attention runs."""

    batch: tuple[str, ...]
    axis: str | None  # None: no axis splits the length
    heads: tuple[str, ...]

    @property
    def axes(self) -> frozenset[str]:
        return frozenset((*self.batch, *self.length, *self.heads))

    @property
    def length(self) -> tuple[str, ...]:
        return () if self.axis is None else (self.axis,)

    def spec(self, *dims: Literal["batch", "length", "heads", None]) -> PartitionSpec:
        entries: dict[str | None, tuple[str, ...]] = {"batch": self.batch, "length": self.length, "heads": self.heads}
        return PartitionSpec(*(entries.get(dim) or None for dim in dims))


def status(axis: str) -> Literal["absent", "auto", "manual"]:
    """Whether the mesh in force, if any, has the axis, and whether a value is one of its shards here. Size 1 is absent."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get(axis, 1) == 1:
        return "absent"
    return "manual" if axis in mesh.manual_axes else "auto"


def size(axes: str | Iterable[str]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in ([axes] if isinstance(axes, str) else axes))


def place(axis: str, batch: int, num_heads: int, num_kv_heads: int) -> Place:
    """Examples are split over the batch axes, heads over `tensor`, where those are there and divide."""
    mine = [name for name in BATCH_AXES if status(name) == "auto"]
    examples = tuple(mine) if batch % size(mine) == 0 else ()
    over_tensor = status(TENSOR) == "auto" and not num_heads % size(TENSOR) and not num_kv_heads % size(TENSOR)
    return Place(examples, axis, (TENSOR,) if over_tensor and axis != TENSOR else ())


def split_sequence(x: jax.Array, *, axis: str = "sequence", dim: int = 1) -> jax.Array:
    """`x` with dim `dim` split over a mesh axis: x[B, T_sequence, ...]. What other axes do to other dims stays as it is.

    Without that axis, where it does not divide the dim, and where values are its shards already, `x` as it is. Put it behind
    the embedding and every layer, and the rest of the model follows; `jzero.attention` splits its own operands.

    Example:
      >>> import jax.numpy as jnp
      >>> split_sequence(jnp.ones((2, 4, 8))).shape
      (2, 4, 8)
    """
    if status(axis) != "auto" or x.shape[dim] % size(axis):
        return x
    entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    entries[dim] = axis
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
