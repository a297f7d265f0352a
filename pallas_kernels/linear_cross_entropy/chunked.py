"""A part of the vocabulary at a time, in XLA's own operations: what exists of the logits is one part's, forward and backward.

The backward pass computes them again: 8 N D V operations where the plain form has 6, and V / 8 of its memory. The cotangent of
each token's loss may be anything.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import varying
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
    lses, parts = [], []
    for start, stop in chunks.cuts(w.shape[loss.vocab_dim], num_chunks):
        here = _in_turn(x, lses)
        chunk = chunks.look(here, _part(w, start, stop, loss), targets, loss, start)
        lses.append(chunk.lse)
        parts.append(chunk.part)
    return jax.nn.logsumexp(jnp.stack(lses), axis=0), sum(parts[1:], parts[0])


def _forward(loss: Loss, num_chunks: int | None, x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
    lse, part = _statistics(loss, num_chunks, x, w, targets)
    return (lse, part), (x, w, targets, lse)


def _backward(loss: Loss, num_chunks: int | None, saved: Any, cotangents: Any) -> Any:
    x, w, targets, lse = saved
    dxs, dws = [], []
    dw = jnp.zeros(w.shape, w.dtype)
    for start, stop in chunks.cuts(w.shape[loss.vocab_dim], num_chunks):
        here, part = _in_turn(x, [*dxs, *dws]), _part(w, start, stop, loss)
        chunk = chunks.look(here, part, targets, loss, start)
        g = chunks.logits_gradient(chunk, lse, targets, *cotangents, loss).astype(x.dtype)
        dxs = [sum(dxs, chunks.input_gradient(g, part, loss))]
        dws = [chunks.weight_gradient(here, g, loss).astype(w.dtype)]
        dw = jax.lax.dynamic_update_slice_in_dim(dw, dws[0], start, loss.vocab_dim)
    return dxs[0].astype(x.dtype), dw, None


_statistics.defvjp(_forward, _backward)


def _part(w: jax.Array, start: int, stop: int, loss: Loss) -> jax.Array:
    return jax.lax.slice_in_dim(w, start, stop, axis=loss.vocab_dim)


def _in_turn(x: jax.Array, after: list[jax.Array]) -> jax.Array:
    """`x`, not to be looked at before `after` is there: one part's logits at a time."""
    return jax.lax.optimization_barrier((x, *after))[0] if after else x
