"""A part of the vocabulary at a time, in XLA's own operations: what exists of the logits is one part's.

A loop, since compilers may drop a barrier before they schedule, and then hold all parts at once. The backward pass computes
them again: 8 N D V operations where the plain form has 6, and V / 8 of its memory. The cotangent of
each token's loss may be anything.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import varying, zeros
from pallas_kernels.linear_cross_entropy import chunks
from pallas_kernels.linear_cross_entropy.reference import Loss, combine, loss_of, over_shards


def losses(x: jax.Array, w: jax.Array, targets: jax.Array, **options: Any) -> jax.Array:
    """Losses[..., T] in float32 (float64 stays)."""
    loss = loss_of(w, options)
    lse, part = _statistics(loss, options.get("num_chunks"), *own(loss, x, w, targets))
    part = jax.lax.psum(part, loss.axis_name) if loss.axis_name else part
    return combine(over_shards(lse, loss), part, targets, loss)


def total(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Sum of weights[..., T] times losses."""
    found = losses(x, w, targets, **options)
    return jnp.sum(found * weights.astype(found.dtype))


def own(loss: Loss, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays as each shard's own, so that JAX adds up over shards what each finds of their gradients."""
    axis = loss.axis_name
    if axis is None:
        return arrays
    return tuple(a if axis in varying(a) else jax.lax.pcast(a, axis, to="varying") for a in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(
    loss: Loss, num_chunks: int | None, x: jax.Array, w: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """This shard's log-sum-exp and picked logits, per token."""
    cut, w = chunks.cut(w.shape[loss.vocab_dim], num_chunks), _once(w)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        chunk = _look(cut, x, w, targets, loss, index)
        return (jnp.logaddexp(carry[0], chunk.lse), carry[1] + chunk.part), None

    first = _look(cut, x, w, targets, loss, jnp.int32(0))
    return jax.lax.scan(step, (first.lse, first.part), jnp.arange(1, cut.number, dtype=jnp.int32))[0]


def _forward(loss: Loss, num_chunks: int | None, x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
    lse, part = _statistics(loss, num_chunks, x, w, targets)
    return (lse, part), (x, w, targets, lse)


def _backward(loss: Loss, num_chunks: int | None, saved: Any, cotangents: Any) -> Any:
    x, w, targets, lse = saved
    cut, w = chunks.cut(w.shape[loss.vocab_dim], num_chunks), _once(w)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        dx, dw = carry
        part, chunk = cut.of(w, index, loss), _look(cut, x, w, targets, loss, index)
        of_lse, of_part = cotangents
        g = chunks.logits_gradient(chunk, lse, targets, of_lse, of_part, loss).astype(x.dtype)
        dx = dx + chunks.input_gradient(g, part, loss)
        more = chunks.weight_gradient(x, g, loss).astype(w.dtype)
        if cut.vocab % cut.size:  # the last part overlaps the one before it, with zeros
            more = more + cut.of(dw, index, loss)
        return (dx, jax.lax.dynamic_update_slice_in_dim(dw, more, cut.start(index), loss.vocab_dim)), None

    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Zeros made of the operands vary over the mesh axes that the operands vary over. The weight's come from behind a barrier:
    # else a compiler makes one array of them and of those for an embedding's gradient, alive from here on.
    nothing = jax.lax.optimization_barrier(zeros((), w.dtype, lse))
    start = zeros(x.shape, wide, lse), jnp.broadcast_to(nothing, w.shape)
    (dx, dw), _ = jax.lax.scan(step, start, jnp.arange(cut.number, dtype=jnp.int32))
    return dx.astype(x.dtype), dw, None


_statistics.defvjp(_forward, _backward)


def _look(cut: chunks.Cut, x: jax.Array, w: jax.Array, targets: jax.Array, loss: Loss, index: jax.Array) -> chunks.Chunk:
    fresh = index * cut.size if cut.vocab % cut.size else None
    return chunks.look(x, cut.of(w, index, loss), targets, loss, cut.start(index), fresh)


def _once(w: jax.Array) -> jax.Array:
    """`w`, used before the loop: a program that gathers its shards where they are used then gathers them once, not in the loop.

    Compilers drop the empty half.
    """
    return jnp.concatenate([w, w[:0]], axis=0)
