"""Stacks of arrays that a loop changes in place: read one entry, write one, add to one."""

from typing import Any

import jax
import jax.numpy as jnp

Arrays = list[jax.Array]


def zeros(leaf: Any, *dims: int) -> jax.Array:
    return jnp.zeros((*dims, *leaf.shape), leaf.dtype)


def at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def get(buffers: Arrays, index: tuple[Any, Any]) -> Arrays:
    """`buffers[index]`."""

    def one(buffer: jax.Array) -> jax.Array:
        start, shape = (*index, *(0,) * (buffer.ndim - 2)), (1, 1, *buffer.shape[2:])
        return jax.lax.dynamic_slice(buffer, start, shape).reshape(shape[2:])

    return [one(buffer) for buffer in buffers]


def put(buffers: Arrays, index: tuple[Any, ...], values: Arrays, *, when: Any = None) -> Arrays:
    """`buffers[index] = values`, in place; unchanged unless `when`."""

    def one(buffer: jax.Array, value: jax.Array) -> jax.Array:
        if when is not None:
            value = jnp.where(when, value, buffer[index])
        start = (*index, *(0,) * (buffer.ndim - len(index)))
        return jax.lax.dynamic_update_slice(buffer, value[(None,) * len(index)], start)

    return [one(*pair) for pair in zip(buffers, values, strict=True)]


def add(totals: Arrays, index: Any, fresh: Arrays) -> Arrays:
    """`totals[index] += fresh`, in place; all of `totals` without an index."""
    if index is None:
        return [total + value.astype(total.dtype) for total, value in zip(totals, fresh, strict=True)]
    rows = at(totals, index)
    added = [row + value.astype(row.dtype) for row, value in zip(rows, fresh, strict=True)]
    return put(totals, (index,), added)
