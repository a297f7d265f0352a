"""Attention by a ring: keys and values go round the devices, each of which adds them to what its queries have seen.

Liu, Zaharia, Abbeel: Ring Attention with Blockwise Transformers for Near-Infinite Context, 2023. A causal ring in which
device i held piece i would leave the first devices idle. So the sequence is cut into 2 S chunks, and device i computes with
chunks i and 2 S - 1 - i ("zigzag"): every visit then needs two blocks of the same size on every device, without a mask. Chunks
travel there and back in four permutes, which move as much as one exchange of heads.

Forward, each device sends its keys and values S - 1 times; backward again, and with them their gradients in float32. What is
saved for the backward pass is one device's queries, keys, values, results and softmax divisors, however long the ring.

Arrays here are one device's: chunks[N, B, T, heads, C] with N = 2 chunks if causal, else N = 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import blocks
from pallas_kernels.attention.blocks import Scores, Stats
from pallas_kernels.attention.masks import both, same_segment, visible


class Ring(NamedTuple):
    """What is the same for a whole call. Inside `shard_map` over `axis`."""

    axis: str
    causal: bool
    num_kv_heads: int

    @property
    def size(self) -> int:
        return jax.lax.axis_size(self.axis)

    @property
    def num_chunks(self) -> int:
        """Per device."""
        return 2 if self.causal else 1

    def chunk(self, device: Any, which: Any) -> Any:
        """The place in the sequence of a device's chunk."""
        return jnp.where(jnp.equal(which, 0), device, 2 * self.size - 1 - device)

    def visits(self, tick: Any) -> list[tuple[Any, Any]]:
        """(query chunk, key chunk) for the keys that come from `tick` devices before, from the second device on."""
        if not self.causal:
            return [(0, 0)]
        wrapped = (tick > jax.lax.axis_index(self.axis)).astype(jnp.int32)  # those keys lie behind the early queries
        return [(1, 0), (wrapped, wrapped)]

    def shift(self, tree: Any) -> Any:
        """To the next device."""
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % self.size) for i in range(self.size)])


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, ring: Ring
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Pieces [B, T_sequence, heads, C] -> the result's piece; chunks of q, k and v; logarithms of the softmax's divisors."""
    (fused,) = to_chunks(ring, jnp.concatenate([q, k, v], axis=2))
    q, keys = _split(fused, ring)
    mask = partial(_mask, ring, segment_ids, q.shape[2])
    stats = jax.vmap(lambda one: blocks.nothing(one, ring.num_kv_heads))(q)

    def add(stats: Stats, keys: Any, tick: Any, visits: Sequence[tuple[Any, Any]], diagonal: bool = False) -> Stats:
        for here, there in visits:
            old, (key, value) = _at(stats, here), _at(keys, there)
            new = blocks.add(old, _at(q, here), key, value, mask(tick, here, there, diagonal), _how(q))
            stats = _put(stats, here, new)
        return stats

    moving = ring.shift(keys)  # on its way while the device's own keys are looked at
    stats = add(stats, keys, 0, [(one, one) for one in range(ring.num_chunks)], ring.causal)
    stats = add(stats, keys, 0, [(1, 0)]) if ring.causal else stats

    def tick(carry: Any, number: Any) -> Any:
        stats, keys = carry
        return (add(stats, keys, number, ring.visits(number)), ring.shift(keys)), None

    (stats, moving), _ = jax.lax.scan(tick, (stats, moving), jnp.arange(1, ring.size - 1))
    stats = add(stats, moving, ring.size - 1, ring.visits(ring.size - 1))
    out, log_total = jax.vmap(blocks.finish)(stats)
    (out,) = from_chunks(ring, out.astype(fused.dtype))
    return out, fused, log_total


def backward(
    fused: jax.Array, log_total: jax.Array, segment_ids: jax.Array | None, out: jax.Array, out_grad: jax.Array, *, ring: Ring
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v's pieces from the result's, and what `forward` left."""
    dot = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1)
    out_grad, dot = to_chunks(ring, out_grad, dot)
    q, keys = _split(fused, ring)
    mask = partial(_mask, ring, segment_ids, q.shape[2])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), keys)

    def add(grads: Any, keys: Any, tick: Any, visits: Sequence[tuple[Any, Any]], diagonal: bool = False) -> Any:
        for here, there in visits:
            q_grads, key_grads = grads
            key, value = _at(keys, there)
            found = blocks.gradient(
                _at(q, here), key, value, mask(tick, here, there, diagonal), _at(out_grad, here), _at(log_total, here),
                _at(dot, here), _how(q),
            )  # fmt: skip
            q_grads = _put(q_grads, here, _at(q_grads, here) + found.q)
            old = _at(key_grads, there)
            grads = q_grads, _put(key_grads, there, (old[0] + found.k, old[1] + found.v))
        return grads

    moving = ring.shift(keys)
    grads = add((jnp.zeros(q.shape, jnp.float32), zeros), keys, 0, [(one, one) for one in range(ring.num_chunks)], ring.causal)
    q_grads, own = add(grads, keys, 0, [(1, 0)]) if ring.causal else grads

    def tick(carry: Any, number: Any) -> Any:
        q_grads, sent, keys = carry
        q_grads, sent = add((q_grads, sent), keys, number, ring.visits(number))
        return (q_grads, ring.shift(sent), ring.shift(keys)), None

    (q_grads, sent, moving), _ = jax.lax.scan(tick, (q_grads, zeros, moving), jnp.arange(1, ring.size - 1))
    q_grads, sent = add((q_grads, sent), moving, ring.size - 1, ring.visits(ring.size - 1))
    key_grads = jax.tree.map(jnp.add, own, ring.shift(sent))  # home again
    found = jnp.concatenate([part.astype(fused.dtype) for part in (q_grads, *key_grads)], axis=3)
    (found,) = from_chunks(ring, found)
    sizes = q.shape[3], q.shape[3] + ring.num_kv_heads
    first, second, third = jnp.split(found, sizes, axis=2)
    return first, second, third


def _how(q: jax.Array) -> Scores:
    return Scores(q.shape[-1] ** -0.5)


def _split(fused: jax.Array, ring: Ring) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    num_heads = fused.shape[3] - 2 * ring.num_kv_heads
    q, k, v = jnp.split(fused, [num_heads, num_heads + ring.num_kv_heads], axis=3)
    return q, (k, v)


def _mask(
    ring: Ring, segment_ids: jax.Array | None, length: int, tick: Any, here: Any, there: Any, diagonal: bool
) -> jax.Array | None:
    """Of a block: the triangle on the diagonal, and where segments agree. segment_ids[B, T] are whole."""
    places = jnp.arange(length)
    mask = visible(places, places, causal=True, sliding_window=None) if diagonal else None
    if segment_ids is None:
        return mask
    device = jax.lax.axis_index(ring.axis)
    places = ring.chunk(device, here), ring.chunk((device - tick) % ring.size, there)
    if not ring.causal:
        places = device, (device - tick) % ring.size
    of_queries, of_keys = (
        jax.lax.dynamic_slice_in_dim(segment_ids, place * length, length, axis=1) for place in places
    )  # fmt: skip
    return both(mask, same_segment(of_queries, of_keys)[:, None, None])


def to_chunks(ring: Ring, *pieces: jax.Array) -> list[jax.Array]:
    """Pieces [B, T, ...] of the sequence as it lies -> the device's chunks [N, B, T / N, ...]."""
    if not ring.causal:
        return [piece[None] for piece in pieces]
    even, odd = _routes(ring.size)
    halves = [jnp.split(piece, 2, axis=1) for piece in pieces]
    evens = jax.lax.ppermute([first for first, _ in halves], ring.axis, even)
    odds = jax.lax.ppermute([second for _, second in halves], ring.axis, odd)
    is_even = jax.lax.axis_index(ring.axis) % 2 == 0  # an even device's early chunk is one of even number
    pairs = zip(evens, odds, strict=True)
    return [jnp.stack([jnp.where(is_even, a, b), jnp.where(is_even, b, a)]) for a, b in pairs]


def from_chunks(ring: Ring, *chunks: jax.Array) -> list[jax.Array]:
    """The reverse of `to_chunks`."""
    if not ring.causal:
        return [chunk[0] for chunk in chunks]
    even, odd = ([(target, source) for source, target in route] for route in _routes(ring.size))
    is_even = jax.lax.axis_index(ring.axis) % 2 == 0
    evens = jax.lax.ppermute([jnp.where(is_even, early, late) for early, late in chunks], ring.axis, even)
    odds = jax.lax.ppermute([jnp.where(is_even, late, early) for early, late in chunks], ring.axis, odd)
    return [jnp.concatenate(pair, axis=1) for pair in zip(evens, odds, strict=True)]


def _routes(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where chunks 2 i and 2 i + 1, which lie on device i, are computed with."""
    device = lambda chunk: min(chunk, 2 * size - 1 - chunk)
    even, odd = ([(i, device(2 * i + which)) for i in range(size)] for which in (0, 1))
    return even, odd


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)


def _put(tree: Any, index: Any, value: Any) -> Any:
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), tree, value)
