"""Many small leaves side by side in one array, so that a kernel is launched once for all of them.

Only for kernels. XLA fuses each leaf's update on its own, and an array made of leaves that are split over devices would be
gathered: see docs/decisions/0002-buckets-are-local.md.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fused_optimizer import body

BELOW = 2**16  # elements: AdamW of 100,000 takes one launch's microsecond at 3 TB/s
WIDTH = 1024  # of a bucket's rows


def run(
    leaves: Sequence[Any], update: Callable[[Any, int], tuple[Any, ...]], takes_kernel: Callable[[Any], bool], below: int
) -> list[Any]:  # fmt: skip
    """What `update(leaf, index)` gives for each leaf, small ones through a common bucket where a kernel takes it."""
    found: list[Any] = [None] * len(leaves)
    for members, is_bucket in groups(leaves, takes_kernel, below):
        if not is_bucket:
            found[members[0]] = update(leaves[members[0]], members[0])
            continue
        outs = update(together([leaves[index] for index in members]), members[0])
        for index, parts in zip(members, apart(outs, [leaves[index].param.shape for index in members]), strict=True):
            found[index] = parts
    return found


def groups(leaves: Sequence[Any], takes_kernel: Callable[[Any], bool], below: int) -> list[tuple[list[int], bool]]:
    """Indices of leaves that are updated together, in the order of their first, and whether they need a bucket."""
    small, alone = defaultdict(list), []
    for index, leaf in enumerate(leaves):
        if below and not leaf.scales and (leaf.param.size < below or misfits(leaf)) and takes_kernel(_stand_in(leaf)):
            dtypes = tuple(str(array.dtype) for array in (leaf.param, leaf.grad, *leaf.moments))
            small[dtypes, leaf.decays].append(index)
        else:
            alone.append([index])
    found = [(members, len(members) > 1 or misfits(leaves[members[0]])) for members in small.values()]
    return sorted([*((members, False) for members in alone), *found])


def misfits(leaf: Any) -> bool:
    """Whether a kernel takes this leaf in a bucket only."""
    return not leaf.scales and body.row_length(leaf.param.shape, has_scales=False) is None


def _stand_in(leaf: Any) -> Any:
    """A bucket with arrays of the leaf's dtypes."""
    shaped = lambda array: jax.ShapeDtypeStruct((1, WIDTH), array.dtype)
    return leaf._replace(param=shaped(leaf.param), grad=shaped(leaf.grad), moments=tuple(map(shaped, leaf.moments)))


def together(leaves: Sequence[Any]) -> Any:
    """One leaf [rows, 1024] of all elements, filled up with zeros: an update of zeros is zero and stays in its place."""

    def joined(arrays: Sequence[Any]) -> Any:
        flat = jnp.concatenate([array.reshape(-1) for array in arrays])
        return jnp.pad(flat, (0, -flat.size % WIDTH)).reshape(-1, WIDTH)

    moments = tuple(map(joined, zip(*(leaf.moments for leaf in leaves), strict=True)))
    return leaves[0]._replace(
        param=joined([leaf.param for leaf in leaves]), grad=joined([leaf.grad for leaf in leaves]), moments=moments
    )


def apart(outs: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[tuple[Any, ...]]:
    """Each leaf's part of each output."""
    flat, found, start = [out.reshape(-1) for out in outs], [], 0
    for shape in shapes:
        size = math.prod(shape)
        found.append(tuple(jax.lax.slice_in_dim(one, start, start + size).reshape(shape) for one in flat))
        start += size
    return found
