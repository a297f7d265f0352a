"""Many small values in one all-reduce: a step's loss, weights, aux and norms."""

from typing import Any

import jax
import jax.numpy as jnp


def add_up(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sum every leaf over `axes`, packed into one vector per dtype, so that it is one collective each."""
    leaves, treedef = jax.tree.flatten(tree)
    out: list[Any] = [None] * len(leaves)
    for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):
        chosen = [index for index, leaf in enumerate(leaves) if leaf.dtype == dtype]
        packed = jax.lax.psum(jnp.concatenate([leaves[index].ravel() for index in chosen]), axes)
        start = 0
        for index in chosen:
            size = leaves[index].size
            out[index], start = packed[start : start + size].reshape(leaves[index].shape), start + size
    return jax.tree.unflatten(treedef, out)
