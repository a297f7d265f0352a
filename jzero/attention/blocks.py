"""One block of attention, some queries against some keys, and how blocks are put together: softmax online, in float32.

Milakov and Gimelshein: Online normalizer calculation for softmax, 2018. Dao: FlashAttention-2, 2023, for the backward pass.
Shapes: B batch, T queries, S keys, H heads, K key-value heads, G = H / K, C head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jzero.attention.plain import MASKED


class Stats(NamedTuple):
    """What attention over the keys so far comes to; all float32."""

    top: jax.Array  # [B, K, G, T], the largest score
    total: jax.Array  # [B, K, G, T], the sum of exp(score - top)
    out: jax.Array  # [B, K, G, T, C], the values weighted by that


class Grads(NamedTuple):
    """Of one block, float32."""

    q: jax.Array  # [B, T, H, C]
    k: jax.Array  # [B, S, K, C]
    v: jax.Array


def nothing(q: jax.Array, num_kv_heads: int) -> Stats:
    """Attention over no keys yet. A first block whose keys are all masked leaves its mark until one with keys wipes it out."""
    batch, length, num_heads, head_dim = q.shape
    rows = (batch, num_kv_heads, num_heads // num_kv_heads, length)
    return Stats(jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, head_dim), jnp.float32))


def add(before: Stats, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> Stats:
    """With more keys. mask: bool, broadcast to [B, K, G, T, S]."""
    scores = _scores(q, k, mask)
    top = jnp.maximum(before.top, scores.max(-1))
    shrink, weights = jnp.exp(before.top - top), jnp.exp(scores - top[..., None])
    out = jnp.einsum("bkgts,bskc->bkgtc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Stats(top, before.total * shrink + weights.sum(-1), before.out * shrink[..., None] + out)


def finish(stats: Stats) -> tuple[jax.Array, jax.Array]:
    """The result [B, T, H, C], and the logarithm of the softmax's divisor [B, K, G, T]."""
    out = jnp.moveaxis(stats.out / stats.total[..., None], 3, 1)
    return out.reshape(*out.shape[:2], -1, out.shape[-1]), stats.top + jnp.log(stats.total)


def gradient(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, out_grad: jax.Array, log_total: jax.Array,
    dot: jax.Array,
) -> Grads:  # fmt: skip
    """Of one block, from the result's gradient [B, T, H, C] and `dot` [B, T, H], its product with the result."""
    weights = jnp.exp(_scores(q, k, mask) - log_total[..., None])
    out_grad = _grouped(out_grad, k)
    dot = jnp.moveaxis(dot.reshape(*dot.shape[:2], k.shape[2], -1), 1, 3)
    into = lambda equation, *operands: jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
    v_grad = into("bkgts,btkgc->bskc", weights.astype(v.dtype), out_grad)
    score_grad = weights * (into("btkgc,bskc->bkgts", out_grad, v) - dot[..., None]) * q.shape[-1] ** -0.5
    score_grad = score_grad.astype(q.dtype)
    q_grad = into("bkgts,bskc->btkgc", score_grad, k).reshape(q.shape)
    return Grads(q_grad, into("bkgts,btkgc->bskc", score_grad, _grouped(q, k)), v_grad)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = jnp.einsum("btkgc,bskc->bkgts", _grouped(q, k), k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores if mask is None else jnp.where(mask, scores, MASKED)


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
