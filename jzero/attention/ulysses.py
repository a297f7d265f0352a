"""Attention by an exchange of heads: each device gets the whole sequence of some heads, and gives it back.

Jacobs et al.: DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models, 2023.

    q, k, v[B, T_sequence, H, C]  --all-to-all-->  [B, T, H_sequence, C]  attention  --all-to-all-->  [B, T_sequence, H, C]

Query, key and value travel in one all-to-all, so each pass needs two.
"""

import math

import jax
import jax.numpy as jnp

from jzero.attention.plain import Attention, attend


def num_copies(num_kv_heads: int, num_pieces: int) -> int:
    """How often each key-value head is sent, so that every device gets those that its query heads read; divides H / K."""
    return num_pieces // math.gcd(num_kv_heads, num_pieces)


def attend_by_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, axis: str, causal: bool,
    implementation: Attention | None,
) -> jax.Array:  # fmt: skip
    """One device's part, inside `shard_map` over `axis`: q, k and v are pieces of the sequence, segment_ids[B, T] is whole."""
    num = jax.lax.axis_size(axis)
    copies = num_copies(k.shape[2], num)
    k, v = (part if copies == 1 else jnp.repeat(part, copies, axis=2) for part in (k, v))
    by_device = [part.reshape(*part.shape[:2], num, -1, part.shape[3]) for part in (q, k, v)]
    sizes = [part.shape[3] for part in by_device]
    fused = jnp.concatenate(by_device, axis=3).reshape(*q.shape[:2], num * sum(sizes), q.shape[3])
    fused = jax.lax.all_to_all(fused, axis, split_axis=2, concat_axis=1, tiled=True)
    q, k, v = jnp.split(fused, [sizes[0], sizes[0] + sizes[1]], axis=2)
    out = attend(q, k, v, causal=causal, segment_ids=segment_ids, implementation=implementation)
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
