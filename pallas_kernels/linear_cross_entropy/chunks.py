"""The tokens of one chunk: their statistics, and the gradients of any function of those. Only a chunk's logits ever exist.

Chunks are cut along T, which no data axis splits, so cutting moves nothing between devices. They are written out one after
the other and not as a loop: uses of w then stand side by side, and a program that gathers w gathers it once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.reference import Loss, logits_of, picked

_MAX_CHUNKS = 8
_CHUNK_BYTES = 128 * 2**20  # of one example's logits: beyond, products are large enough to be cut


def num_chunks_for(length: int, vocab: int, itemsize: int) -> int:
    """Chunks of T: a power of two. From one example's logits, not from the batch, which differs between shards and whole."""
    wanted = -(-length * vocab * itemsize // _CHUNK_BYTES)
    return min(1 << (wanted - 1).bit_length(), _MAX_CHUNKS, length) if length else 1


def cuts(length: int, num_chunks: int) -> Iterator[slice]:
    """Slices of T, nearly equal."""
    size = -(-length // max(1, min(num_chunks, length)))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class Chunk(NamedTuple):
    """Statistics per token, and what their gradient is made of."""

    lse: jax.Array  # this shard's log-sum-exp
    part: jax.Array  # what is subtracted from it
    logits: jax.Array
    columns: jax.Array


def look(x: jax.Array, w: jax.Array, targets: jax.Array, loss: Loss) -> Chunk:
    logits, columns = logits_of(x, w, loss)
    return Chunk(jax.nn.logsumexp(logits, axis=-1), picked(logits, columns, targets, loss), logits, columns)


def logits_gradient(
    chunk: Chunk, lse: jax.Array, targets: jax.Array, of_lse: jax.Array, of_part: jax.Array, loss: Loss, size: int
) -> jax.Array:
    """d/d raw logits of `of_lse * lse + of_part * part`; `lse` may be the whole vocabulary's, of `size` columns."""
    hit = chunk.columns == targets[..., None]
    smooth = loss.label_smoothing
    share = jnp.where(hit, 1 - smooth + smooth / size, smooth / size) if smooth else hit.astype(lse.dtype)
    gradient = of_lse[..., None] * jnp.exp(chunk.logits - lse[..., None]) + of_part[..., None] * share
    if loss.soft_cap is not None:
        gradient = gradient * (1 - (chunk.logits / loss.soft_cap) ** 2)
    return jnp.where(jnp.isfinite(chunk.logits), gradient, 0.0)


def input_gradient(g: jax.Array, w: jax.Array, loss: Loss) -> jax.Array:
    """g[..., V] back through w, in x's shape."""
    return jnp.einsum("...v,dv->...d" if loss.vocab_dim == 1 else "...v,vd->...d", g, w)


def weight_gradient(x: jax.Array, g: jax.Array, loss: Loss) -> jax.Array:
    """x^T g summed over all tokens, accumulated in float32 (float64 stays), in w's shape."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    left, right = (x, g) if loss.vocab_dim == 1 else (g, x)
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left.T, right, preferred_element_type=accumulate)

    return jax.lax.platform_dependent(left, right, cpu=_on_cpu(accumulate), default=product)


def _on_cpu(accumulate: jnp.dtype):
    """XLA:CPU multiplies a transposed left side at half speed, so the transpose is made, between barriers that keep it."""

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        turned = jax.lax.optimization_barrier(left.T)
        return jax.lax.optimization_barrier(jnp.matmul(turned, right, preferred_element_type=accumulate))

    return product
