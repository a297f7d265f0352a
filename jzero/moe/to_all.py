"""Without a capacity: every choice reaches its expert, however many there are.

Shapes as in `jzero.moe.experts`; S = B T K choices. Between devices each pair exchanges a block of `bound` rows, of which as
many are filled as there are choices: bound = B T min(K, E/n), since a token chooses different experts and one device has
E/n of them. So nothing can overflow, and what that costs is known: n bound / S times the rows that are really there.
"""

import jax
import jax.numpy as jnp

from jzero.moe.place import AXIS


def send(x: jax.Array, ids: jax.Array, *, num_experts: int, num_devices: int) -> list[jax.Array]:
    """x[B, T, D], ids[B, T, K] -> rows[R, D] by expert, where[B, T, K], counts[E / n] and, between devices, unsort[R]."""
    top_k = ids.shape[-1]
    slots = ids.reshape(-1)
    order = jnp.argsort(slots, stable=True)  # choices by expert, and by token within one
    counts = jnp.bincount(slots, length=num_experts)  # [E]
    tokens = x.reshape(-1, x.shape[-1])
    if num_devices == 1:
        where = jnp.argsort(order).astype(jnp.int32)  # the inverse: a permutation's argsort
        return [tokens[order // top_k], where.reshape(ids.shape), counts.astype(jnp.int32)]
    num_here = num_experts // num_devices
    bound = tokens.shape[0] * min(top_k, num_here)
    by_device = counts.reshape(num_devices, num_here)
    ends = jnp.cumsum(by_device.sum(axis=1))  # of each device's run in `order`
    starts = ends - by_device.sum(axis=1)
    place = starts[:, None] + jnp.arange(bound)  # [n, bound] in `order`
    is_filled = place < ends[:, None]
    chosen = order[jnp.minimum(place, slots.size - 1)] // top_k
    blocks = jnp.where(is_filled[..., None], tokens[chosen], 0)
    received = _exchange(blocks).reshape(-1, x.shape[-1])  # [n bound, D], block by sender
    theirs = _exchange(by_device)  # [n, E / n]: rows of each sender for each expert here
    last = jnp.cumsum(theirs, axis=1)
    expert = (jnp.arange(bound)[None, :, None] >= last[:, None, :]).sum(axis=-1)  # E / n where a row is empty
    sort = jnp.argsort(expert.reshape(-1), stable=True)
    device = slots // num_here
    where = device * bound + jnp.argsort(order) - starts[device]
    unsort = jnp.argsort(sort)
    return [
        received[sort], where.reshape(ids.shape).astype(jnp.int32), theirs.sum(axis=0).astype(jnp.int32),
        unsort.astype(jnp.int32),
    ]  # fmt: skip


def bring_back(rows: jax.Array, where: jax.Array, *unsort: jax.Array, num_devices: int) -> jax.Array:
    """rows[R, D] -> [B, T, K, D]."""
    if num_devices > 1:
        blocks = rows[unsort[0]].reshape(num_devices, -1, rows.shape[-1])
        rows = _exchange(blocks).reshape(rows.shape)
    return rows[where]


def _exchange(blocks: jax.Array) -> jax.Array:
    """[n, ...]: block i goes to device i; what comes back is block i from device i."""
    return jax.lax.all_to_all(blocks, AXIS, split_axis=0, concat_axis=0, tiled=True)
