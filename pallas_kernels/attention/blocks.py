"""One block of attention, some queries against some keys, and how blocks are put together: softmax online, in float32.

Milakov and Gimelshein: Online normalizer calculation for softmax, 2018. Dao: FlashAttention-2, 2023, for the backward pass.
Shapes: B batch, T queries, S keys, H heads, K key-value heads, G = H / K, C head dim. float64 stays float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import zeros

MASKED = -1e30  # finite: a row of -inf alone would make NaN, and its gradient too
_ANY_SEEN = MASKED / 2  # a largest score below this is the mark of a row that has seen no key


class Scores(NamedTuple):
    """How a product of query and key becomes a score: soft_cap tanh(scale q k / soft_cap)."""

    scale: float
    soft_cap: float | None = None  # Gemma Team: Gemma 2, 2024


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


def wide(dtype: Any) -> Any:
    """What sums are kept in."""
    return jnp.promote_types(dtype, jnp.float32)


def nothing(q: jax.Array, num_kv_heads: int) -> Stats:
    """Attention over no keys yet. A first block whose keys are all masked leaves its mark until one with keys wipes it out."""
    batch, length, num_heads, head_dim = q.shape
    rows = (batch, num_kv_heads, num_heads // num_kv_heads, length)
    none = zeros(rows, wide(q.dtype), q)
    return Stats(none + MASKED, none, zeros((*rows, head_dim), none.dtype, q))


def add(before: Stats, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, how: Scores) -> Stats:
    """With more keys. mask: bool, broadcast to [B, K, G, T, S]."""
    scores = masked(scores_of(q, k, how), mask)
    top = jnp.maximum(before.top, scores.max(-1))
    shrink, weights = jnp.exp(before.top - top), jnp.exp(scores - top[..., None])
    out = jnp.einsum("bkgts,bskc->bkgtc", weights.astype(v.dtype), v, preferred_element_type=before.out.dtype)
    return Stats(top, before.total * shrink + weights.sum(-1), before.out * shrink[..., None] + out)


def finish(stats: Stats) -> tuple[jax.Array, jax.Array]:
    """The result [B, T, H, C], and the log of the softmax's divisor [B, K, G, T]; where no key was seen 0 and infinity."""
    seen = stats.top > _ANY_SEEN
    divisor = jnp.where(seen, stats.total, 1.0)
    out = jnp.moveaxis(jnp.where(seen[..., None], stats.out / divisor[..., None], 0.0), 3, 1)
    log_total = jnp.where(seen, stats.top + jnp.log(divisor), jnp.inf)  # of which every weight is exp(-inf)
    return out.reshape(*out.shape[:2], -1, out.shape[-1]), log_total


def gradient(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, out_grad: jax.Array, log_total: jax.Array,
    dot: jax.Array, how: Scores,
) -> Grads:  # fmt: skip
    """Of one block, from the result's gradient [B, T, H, C] and `dot` [B, T, H], its product with the result.

    Where `log_total` is used too, `dot` is less its gradient.
    """
    scores = scores_of(q, k, how)
    weights = jnp.exp(masked(scores, mask) - log_total[..., None])
    out_grad = grouped(out_grad, k)
    dot = jnp.moveaxis(dot.reshape(*dot.shape[:2], k.shape[2], -1), 1, 3)
    into = lambda equation, *operands: jnp.einsum(equation, *operands, preferred_element_type=scores.dtype)
    v_grad = into("bkgts,btkgc->bskc", weights.astype(v.dtype), out_grad)
    score_grad = weights * (into("btkgc,bskc->bkgts", out_grad, v) - dot[..., None]) * how.scale
    if how.soft_cap is not None:
        score_grad = score_grad * (1 - (scores / how.soft_cap) ** 2)
    score_grad = score_grad.astype(q.dtype)
    q_grad = into("bkgts,bskc->btkgc", score_grad, k).reshape(q.shape)
    return Grads(q_grad, into("bkgts,btkgc->bskc", score_grad, grouped(q, k)), v_grad)


def scores_of(q: jax.Array, k: jax.Array, how: Scores) -> jax.Array:
    """[B, K, G, T, S], before any mask."""
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped(q, k), k, preferred_element_type=wide(q.dtype)) * how.scale
    return capped(scores, how)


def capped(scores: jax.Array, how: Scores) -> jax.Array:
    return scores if how.soft_cap is None else how.soft_cap * jnp.tanh(scores / how.soft_cap)


def masked(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    return scores if mask is None else jnp.where(mask, scores, MASKED)


def grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    """Heads [B, T, H, C] by the key-value head that they read: [B, T, K, G, C]."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
