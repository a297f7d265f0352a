"""A block of queries and keys at a time, in XLA's own operations: what exists of the scores is one block's.

One loop forward and one backward over the pairs of blocks that see each other; the list of pairs is made while tracing, so a
causal mask halves the work and a window leaves a band of it. Saved for the backward pass: operands, result, and the
softmax's divisors, as Dao has it (FlashAttention-2, 2023).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import blocks
from pallas_kernels.attention.masks import both, same_segment, visible
from pallas_kernels.dispatch import zeros

CHUNK = 512  # a block's scores are a MiB per head then, and its products large enough for any matrix unit


class Cut(NamedTuple):
    """What is static of a call. Lengths that no chunk divides are padded; padded keys are masked, padded queries cut off."""

    causal: bool
    sliding_window: int | None
    how: blocks.Scores
    chunk: int
    num_queries: int
    num_keys: int

    def pairs(self) -> list[tuple[int, int]]:
        """(block of queries, block of keys), those that see each other, by queries."""
        size, window = self.chunk, self.sliding_window
        found = []
        for i in range(-(-self.num_queries // size)):
            for j in range(-(-self.num_keys // size)):
                is_later, nearest = j > i, (abs(i - j) - 1) * size + 1  # the least distance between two of their places
                if not (self.causal and is_later) and not (window is not None and i != j and nearest >= window):
                    found.append((i, j))
        return found


def attend(
    *arrays: jax.Array, causal: bool, sliding_window: int | None, soft_cap: float | None, scale: float, return_lse: bool,
    chunk: int | None = None,
) -> Any:  # fmt: skip
    """As `reference.attend`; `chunk` is the length of a block."""
    q, k, v, *segments = arrays
    size = min(chunk or CHUNK, max(q.shape[1], k.shape[1]))
    cut = Cut(causal, sliding_window, blocks.Scores(scale, soft_cap), size, q.shape[1], k.shape[1])
    ids = [segments[0], segments[-1]] if segments else []
    fill = lambda x: jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    out, log_total = _attend(cut, *map(fill, (q, k, v, *ids)))
    out, lse = out[:, : q.shape[1]], jnp.moveaxis(log_total, 3, 1).reshape(*out.shape[:3])[:, : q.shape[1]]
    return (out, jnp.where(jnp.isposinf(lse), -jnp.inf, lse)) if return_lse else out  # a constant: no gradient, whatever comes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The result, and the logarithm of the softmax's divisors [B, K, G, T]."""
    return _forward(cut, q, k, v, *ids)[0]


def _forward(cut: Cut, q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
    empty = blocks.nothing(q, k.shape[2])
    start = jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, cut.chunk, axis=3), empty)

    def step(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        stats, out, log_total = carry
        stats = jax.tree.map(lambda fresh, old: jnp.where(pair[2], fresh, old), start, stats)
        stats = blocks.add(stats, *_operands(cut, pair, q, k, v), _mask(cut, pair, ids), cut.how)
        own, divisor = blocks.finish(stats)  # written after every pair: the last of a block of queries stays
        return (stats, _put(cut, out, pair[0], own, 1), _put(cut, log_total, pair[0], divisor, 3)), None

    carry = start, zeros(q.shape, q.dtype, q), zeros(empty.top.shape, empty.top.dtype, q)
    (_, out, log_total), _ = jax.lax.scan(step, carry, _listed(cut))
    return (out, log_total), (q, k, v, ids, out, log_total)


def _backward(cut: Cut, saved: Any, cotangents: Any) -> Any:
    q, k, v, ids, out, log_total = saved
    out_grad, log_total_grad = cotangents
    precise = blocks.wide(q.dtype)
    dot = jnp.sum(out.astype(precise) * out_grad.astype(precise), axis=-1)
    dot = dot - jnp.moveaxis(log_total_grad, 3, 1).reshape(dot.shape)

    def step(grads: blocks.Grads, pair: jax.Array) -> tuple[blocks.Grads, None]:
        of_queries = _take(cut, pair[0])
        found = blocks.gradient(
            *_operands(cut, pair, q, k, v), _mask(cut, pair, ids), of_queries(out_grad, 1), of_queries(log_total, 3),
            of_queries(dot, 1), cut.how,
        )  # fmt: skip
        places = blocks.Grads(pair[0], pair[1], pair[1])
        more = [_put(cut, old, at, _take(cut, at)(old, 1) + new, 1) for old, at, new in zip(grads, places, found, strict=True)]
        return blocks.Grads(*more), None

    start = blocks.Grads(*(zeros(part.shape, precise, q) for part in (q, k, v)))
    grads, _ = jax.lax.scan(step, start, _listed(cut))
    return *(grad.astype(part.dtype) for grad, part in zip(grads, (q, k, v), strict=True)), *[None] * len(ids)


_attend.defvjp(_forward, _backward)


def _listed(cut: Cut) -> jax.Array:
    """[pairs, 3]: the block of queries, of keys, and whether it is that block's first."""
    pairs = cut.pairs()
    first = [index == 0 or pairs[index - 1][0] != pair[0] for index, pair in enumerate(pairs)]
    return jnp.array([(*pair, int(one)) for pair, one in zip(pairs, first, strict=True)], jnp.int32)


def _operands(cut: Cut, pair: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _take(cut, pair[0])(q, 1), _take(cut, pair[1])(k, 1), _take(cut, pair[1])(v, 1)


def _mask(cut: Cut, pair: jax.Array, ids: Any) -> jax.Array | None:
    """Of a block, over [B, K, G, T, S]: by places, where keys end, and by segments."""
    places, keys = (index * cut.chunk + jnp.arange(cut.chunk) for index in (pair[0], pair[1]))
    mask = visible(places, keys, causal=cut.causal, sliding_window=cut.sliding_window)
    if cut.num_keys % cut.chunk:
        mask = both(mask, (keys < cut.num_keys)[None, :])
    if not ids:
        return mask
    return both(mask, same_segment(_take(cut, pair[0])(ids[0], 1), _take(cut, pair[1])(ids[1], 1))[:, None, None])


def _take(cut: Cut, index: Any) -> Callable[[jax.Array, int], jax.Array]:
    return lambda x, dim: jax.lax.dynamic_slice_in_dim(x, index * cut.chunk, cut.chunk, dim)


def _put(cut: Cut, x: jax.Array, index: Any, value: jax.Array, dim: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), index * cut.chunk, dim)
