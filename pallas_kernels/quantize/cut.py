"""An array cut into blocks along one of its dims, by reshapes within that dim alone, so that others stay split over devices."""

import jax
import jax.numpy as jnp


def num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def blocked(values: jax.Array, dim: int, block: int) -> jax.Array:
    """`[..., num_blocks, block, ...]`, the last block filled up with zeros."""
    number = num_blocks(values.shape[dim], block)
    missing = number * block - values.shape[dim]
    if missing:
        values = jnp.pad(values, [(0, missing if one == dim else 0) for one in range(values.ndim)])
    return values.reshape(*values.shape[:dim], number, block, *values.shape[dim + 1 :])


def whole(blocks: jax.Array, dim: int, size: int) -> jax.Array:
    """The array again, cut off at `size`."""
    full = (*blocks.shape[:dim], blocks.shape[dim] * blocks.shape[dim + 1], *blocks.shape[dim + 2 :])
    return jax.lax.slice_in_dim(blocks.reshape(full), 0, size, axis=dim)
