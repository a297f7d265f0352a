"""View operations: equations whose output is the same parameter, seen differently, and so still the same shard.

A view is a map of dims: output dim `i` is input dim `dims[i]`, or a new dim of size one. Because casts are views, the
wire carries the compute dtype; because slices are, a scanned layer is gathered alone. An equation that is not in the
table is a use.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

Dims = tuple[int | None, ...]
Shape = tuple[int, ...]


def _same(eqn: Any, shape: Shape) -> Dims:
    return tuple(range(len(shape)))


def _moved(eqn: Any, shape: Shape) -> Dims | None:
    """Only to another memory: to other devices is a use."""
    to_memory = all(isinstance(target, jax.memory.Space) for target in eqn.params["devices"])
    return _same(eqn, shape) if to_memory else None


def _transpose(eqn: Any, shape: Shape) -> Dims:
    return tuple(eqn.params["permutation"])


def _squeeze(eqn: Any, shape: Shape) -> Dims:
    dropped = {dim % len(shape) for dim in eqn.params["dimensions"]}
    return tuple(dim for dim in range(len(shape)) if dim not in dropped)


def _broadcast(eqn: Any, shape: Shape) -> Dims | None:
    """Only new dims of size one: anything that repeats data is a use."""
    new = eqn.params["shape"]
    if math.prod(new) != math.prod(shape):
        return None
    dims: list[int | None] = [None] * len(new)
    for source, target in enumerate(eqn.params["broadcast_dimensions"]):
        dims[target] = source
    return tuple(dims)


def _slice(eqn: Any, shape: Shape) -> Dims:
    limits, strides = eqn.params["limit_indices"], eqn.params["strides"] or (1,) * len(shape)
    spans = zip(eqn.params["start_indices"], limits, strides, shape, strict=True)
    whole = [(start, limit, stride) == (0, size, 1) for start, limit, stride, size in spans]
    return tuple(dim if kept else None for dim, kept in enumerate(whole))


def _dynamic_slice(eqn: Any, shape: Shape) -> Dims:
    sizes = zip(eqn.params["slice_sizes"], shape, strict=True)
    return tuple(dim if size == full else None for dim, (size, full) in enumerate(sizes))


def _split(eqn: Any, shape: Shape) -> Dims:
    return tuple(dim if dim != eqn.params["axis"] else None for dim in range(len(shape)))


def _reshape(eqn: Any, shape: Shape) -> Dims | None:
    """Dims pair up where their running products meet; the first large dim of a group keeps the shard, being the slowest."""
    if eqn.params.get("dimensions") is not None or math.prod(shape) == 0:
        return None
    new = eqn.params["new_sizes"]
    dims: list[int | None] = [None] * len(new)
    before = after = 0
    while before < len(shape) and after < len(new):
        if shape[before] == 1 != new[after]:
            before += 1
        elif new[after] == 1 != shape[before]:
            after += 1
        else:
            dims[after] = before
            before, after = _end_of_group(shape, new, before, after)
    return tuple(dims)


def _end_of_group(shape: Shape, new: Shape, before: int, after: int) -> tuple[int, int]:
    left, right = shape[before], new[after]
    before, after = before + 1, after + 1
    while left != right:
        if left < right:
            left, before = left * shape[before], before + 1
        else:
            right, after = right * new[after], after + 1
    return before, after


VIEWS: dict[str, Callable[[Any, Shape], Dims | None]] = {
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "reduce_precision", "name", "stop_gradient"), _same),
    "device_put": _moved,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "reshape": _reshape,
}

# For each view, the parameter that spells a shape, which must be a shard's when the equation runs on one.
_SIZES = {
    "broadcast_in_dim": "shape",
    "slice": "limit_indices",
    "dynamic_slice": "slice_sizes",
    "reshape": "new_sizes",
}


def dims_of(eqn: Any) -> Dims | None:
    """The map of dims if the equation is a view of its first operand, else None."""
    rule = VIEWS.get(eqn.primitive.name)
    return rule(eqn, eqn.invars[0].aval.shape) if rule else None


def on_a_shard(eqn: Any, num_shards_per_dim: tuple[int, ...]) -> dict[str, Any]:
    """The parameters to change so that the view runs on a shard; the counts are of the output's dims."""
    name = _SIZES.get(eqn.primitive.name)
    if name is None:
        return {}
    return {name: tuple(size // count for size, count in zip(eqn.params[name], num_shards_per_dim, strict=True))}
