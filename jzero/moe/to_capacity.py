"""With a capacity: of each example an expert takes the first C choices that fell on it, by token and then by rank.

Shapes as in `jzero.moe.experts`. Lepikhin et al.: GShard, 2021, whose groups are the examples here.
"""

import jax
import jax.numpy as jnp

from jzero.moe.place import AXIS


def send(x: jax.Array, ids: jax.Array, *, num_experts: int, capacity: int, num_devices: int) -> list[jax.Array]:
    """x[B, T, D], ids[B, T, K] -> rows[E / n, n B, C, D], where[B, T, K]: place in [E, C], -1 if dropped."""
    num_examples, num_tokens, top_k = ids.shape
    slots = ids.reshape(num_examples, -1)
    is_here = jax.nn.one_hot(slots, num_experts, dtype=jnp.int32)  # [B, T K, E]
    before = jnp.cumsum(is_here, axis=1) - is_here
    rank = jnp.take_along_axis(before, slots[..., None], axis=-1)[..., 0]
    where = jnp.where(rank < capacity, slots * capacity + rank, -1)
    num_rows, num_slots = num_experts * capacity, num_tokens * top_k
    example = jnp.arange(num_examples)[:, None]
    target = jnp.where(where < 0, num_rows, where)  # one past the end: not written
    slot_of = jnp.full((num_examples, num_rows), num_slots).at[example, target].set(jnp.arange(num_slots), mode="drop")
    filled = slot_of < num_slots
    chosen = x[example, jnp.minimum(slot_of, num_slots - 1) // top_k]  # [B, E C, D]
    rows = jnp.where(filled[..., None], chosen, 0).reshape(num_examples, num_experts, capacity, -1).swapaxes(0, 1)
    if num_devices > 1:
        rows = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)
    return [rows, where.reshape(ids.shape).astype(jnp.int32)]


def bring_back(rows: jax.Array, where: jax.Array, *, num_devices: int) -> jax.Array:
    """rows[E / n, n B, C, D] -> [B, T, K, D], zero where a choice was dropped."""
    if num_devices > 1:
        rows = jax.lax.all_to_all(rows, AXIS, split_axis=1, concat_axis=0, tiled=True)
    num_experts, num_examples, capacity, dim = rows.shape
    flat = rows.swapaxes(0, 1).reshape(num_examples, num_experts * capacity, dim)
    places = jnp.maximum(where, 0).reshape(num_examples, -1)
    chosen = jnp.take_along_axis(flat, places[..., None], axis=1).reshape(*where.shape, dim)
    return jnp.where((where >= 0)[..., None], chosen, 0)
