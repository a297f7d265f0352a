"""Where experts are: on this device, or spread over the mesh axis `expert`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jzero._errors import explain
from jzero._types import BATCH_AXES

AXIS = "expert"
WHO = "jzero.moe"


class Place(NamedTuple):
    """Over how many devices the experts are spread, and who says so."""

    num_devices: int = 1  # of the axis `expert` that share the experts; 1: all are here
    mesh: Any = None  # where `expert` is not manual yet: the mesh whose batch axes a `shard_map` has to make so


HERE = Place()


def find(num_experts: int, num_here: int, num_examples: int) -> Place:
    """From the mesh in force, the experts that the weights hold and the examples that `x` holds.

    Raises:
      ValueError: the weights hold neither all experts nor this device's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get(AXIS, 1)
    if num_here == num_experts and (size == 1 or AXIS in mesh.manual_axes):
        return HERE  # `expert` is then one more axis for examples
    if AXIS in mesh.manual_axes and num_here * size == num_experts:
        return Place(size)
    if num_here != num_experts:
        found = [f"{num_here} experts in the weights, {num_experts} columns in the router"]
        fix = "Give router[D, E] and weights[E, ...]; `expert` is split by rules= of jzero.shard, not by hand."
        raise ValueError(
            explain(WHO, "router and weights disagree on the experts", found=found, context=f"mesh {dict(mesh.shape)}", fix=fix)
        )
    axes = _batch_axes(mesh)
    num_shards = 1
    for axis in axes:
        num_shards *= mesh.shape[axis]
    is_free = not set(axes) & set(mesh.manual_axes)
    if num_experts % size:
        legal = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        found, fix = [f"expert={size}, {num_experts} experts"], f"Legal sizes of the axis: {legal}."
        raise ValueError(
            explain(WHO, "the axis 'expert' must divide the experts", found=found, context=f"mesh {dict(mesh.shape)}", fix=fix)
        )
    return Place(size, mesh) if is_free and num_examples % num_shards == 0 else HERE


def _batch_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def specs(place: Place) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of arrays whose dim 0 runs over examples; of weights[E, ...]; of rows[E, B, ...]."""
    axes = _batch_axes(place.mesh)
    others = tuple(axis for axis in axes if axis != AXIS)
    return PartitionSpec(axes), PartitionSpec(AXIS), PartitionSpec(AXIS, others)


def manually(fn: Callable[..., Any], place: Place, ins: Sequence[Any], outs: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """`fn(*args)` where the experts' axis is manual: here already, or by a `shard_map` over the batch axes."""
    if place.mesh is None:
        return list(fn(*args))
    run = jax.shard_map(
        lambda *args: list(fn(*args)), mesh=place.mesh, in_specs=tuple(ins), out_specs=list(outs),
        axis_names=frozenset(_batch_axes(place.mesh)), check_vma=False,
    )  # fmt: skip
    return run(*args)
