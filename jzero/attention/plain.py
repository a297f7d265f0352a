"""Attention on whole sequences: by XLA, or by cuDNN's fused kernel where there is one.

Shapes: B batch, T length, H heads, K key-value heads, G = H / K, C head dim.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

Attention = Literal["plain", "cudnn"]
MASKED = -1e30  # finite: a row of -inf alone would make NaN, and its gradient too


def choose_attention(dtype: Any) -> Attention:
    """cuDNN's fused attention for 16-bit activations on an NVIDIA GPU; plain XLA elsewhere. Decided while tracing."""
    sixteen_bit = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if sixteen_bit and jax.default_backend() == "gpu" else "plain"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = True, segment_ids: jax.Array | None = None,
    implementation: Attention | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention. q[B, T, H, C], k and v[B, T, K, C], segment_ids[B, T] -> [B, T, H, C]; H is a multiple of K.

    `implementation=None` chooses by device and dtype (`choose_attention`); a name insists.
    """
    if (implementation or choose_attention(q.dtype)) == "cudnn":
        mask = None if segment_ids is None else same_segment(segment_ids, segment_ids)[:, None]
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask, implementation="cudnn")
    # Scores are recomputed in the backward pass: [B, H, T, T] is the largest thing a layer could save.
    return jax.checkpoint(_attend_plain, static_argnums=(3,))(q, k, v, causal, segment_ids)


def _attend_plain(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, segment_ids: jax.Array | None) -> jax.Array:
    batch, length, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], head_dim)
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped, k).astype(jnp.float32) * head_dim**-0.5
    if causal:
        scores = jnp.where(not_later(length), scores, MASKED)
    if segment_ids is not None:
        scores = jnp.where(same_segment(segment_ids, segment_ids)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(q.shape)


def not_later(length: int) -> jax.Array:
    """bool[T, S]: the key at S is not after the query at T."""
    return jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]


def same_segment(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """bool[B, T, S]"""
    return of_queries[:, :, None] == of_keys[:, None, :]
