"""The logits of a part of the vocabulary: their statistics per token, and the gradients of any function of those."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.reference import Loss, logits_of, picked

LARGE_BYTES = 256 * 2**20  # of one example's logits: from there on memory is worth computing them twice
_NUM_CHUNKS = 8
_LANES = 128  # of a TPU's tile: parts are whole tiles


class Cut(NamedTuple):
    """Parts of a vocabulary, all of one size: the last begins early where they do not fit, and leaves out what others had."""

    number: int
    size: int
    vocab: int

    def start(self, index: Any) -> Any:
        return jnp.minimum(index * self.size, self.vocab - self.size)

    def of(self, w: jax.Array, index: Any, loss: Loss) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(w, self.start(index), self.size, loss.vocab_dim)


def cut(vocab: int, num_chunks: int | None) -> Cut:
    """`num_chunks` parts (None: 8), fewer where whole tiles make fewer."""
    size = -(-vocab // max(1, min(num_chunks or _NUM_CHUNKS, vocab)))
    size = min(-(-size // _LANES) * _LANES, vocab) if size > _LANES else size
    return Cut(-(-vocab // size), size, vocab)


class Chunk(NamedTuple):
    """Statistics per token, and what their gradient is made of."""

    lse: jax.Array  # this shard's log-sum-exp
    part: jax.Array  # what is subtracted from it
    logits: jax.Array
    columns: jax.Array


def look(x: jax.Array, w: jax.Array, targets: jax.Array, loss: Loss, first: Any = 0, fresh: Any = None) -> Chunk:
    """`w` is the part that begins at column `first` of this shard's; columns before `fresh` belong to another part."""
    logits, columns = logits_of(x, w, loss, first)
    if fresh is not None:
        is_fresh = first + jnp.arange(logits.shape[-1]) >= fresh
        logits, columns = jnp.where(is_fresh, logits, -jnp.inf), jnp.where(is_fresh, columns, -1)
    return Chunk(jax.nn.logsumexp(logits, axis=-1), picked(logits, columns, targets, loss), logits, columns)


def logits_gradient(
    chunk: Chunk, lse: jax.Array, targets: jax.Array, of_lse: jax.Array, of_part: jax.Array, loss: Loss
) -> jax.Array:
    """d/d raw logits of `of_lse * lse + of_part * part`; `lse` may be the whole vocabulary's."""
    hit = chunk.columns == targets[..., None]
    smooth = loss.label_smoothing
    share = jnp.where(hit, 1 - smooth + smooth / loss.num_real, smooth / loss.num_real) if smooth else hit.astype(lse.dtype)
    gradient = of_lse[..., None] * jnp.exp(chunk.logits - lse[..., None]) + of_part[..., None] * share
    if loss.soft_cap is not None:
        gradient = gradient * (1 - (chunk.logits / loss.soft_cap) ** 2)
    return jnp.where(jnp.isfinite(chunk.logits), gradient, 0.0)


def input_gradient(g: jax.Array, w: jax.Array, loss: Loss) -> jax.Array:
    """g[..., V] back through w, in x's shape, in float32 (float64 stays)."""
    contract = "...v,dv->...d" if loss.vocab_dim == 1 else "...v,vd->...d"
    return jnp.einsum(contract, g, w, preferred_element_type=jnp.promote_types(g.dtype, jnp.float32))


def weight_gradient(x: jax.Array, g: jax.Array, loss: Loss) -> jax.Array:
    """x^T g summed over all tokens, in w's shape; in x's dtype, but float32 for float16, which a sum may pass."""
    accumulate = jnp.float32 if x.dtype == jnp.float16 else x.dtype
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
