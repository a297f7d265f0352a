"""The definition, with the scores in memory: softmax(soft_cap tanh(scale q k^T / soft_cap) over the keys in sight) v.

Scores are written in the operands' dtype, as a plain product's are, and the softmax is in float32 (float64 stays).
Shapes: B batch, T queries, S keys, H heads, K key-value heads, G = H / K, C head dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.blocks import Scores, capped, grouped, masked, wide
from pallas_kernels.attention.masks import both, same_segment, visible


def attend(*arrays: jax.Array, return_lse: bool, chunk: int | None = None, **options: Any) -> Any:
    """All of it in one block, whatever `chunk` (of kernels that are disabled).

    q[B, T, H, C], k and v[B, S, K, C], then segments [B, T] and the keys' [B, S], if there are any -> [B, T, H, C].
    """
    # Scores are recomputed in the backward pass: [B, H, T, S] is the largest thing a layer could save.
    out, lse = jax.checkpoint(partial(_attend, **options))(*arrays)
    return (out, lse) if return_lse else out


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array, causal: bool, sliding_window: int | None,
    soft_cap: float | None, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped(q, k), k).astype(wide(q.dtype)) * scale
    mask: Any = visible(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), causal=causal, sliding_window=sliding_window)
    if segments:
        mask = both(mask, same_segment(segments[0], segments[-1])[:, None, None])
    scores = masked(capped(scores, Scores(scale, soft_cap)), mask)
    weights, lse = jax.nn.softmax(scores, axis=-1), jax.nn.logsumexp(scores, axis=-1)
    if len(segments) > 1:  # else every query sees at least its own place
        seen = jnp.any(mask, axis=-1)
        weights, lse = jnp.where(seen[..., None], weights, 0.0), jnp.where(seen, lse, -jnp.inf)
    out = jnp.einsum("bkgts,bskc->btkgc", weights.astype(v.dtype), v).reshape(q.shape)
    return out, jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])
