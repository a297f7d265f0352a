"""The weighted sum of the losses whose forward pass leaves the gradients behind, as Liger does (Hsu et al., 2024).

The cotangent of a sum is one number, so the backward pass only scales: 6 N D V operations, as the plain form; the logits live
in the forward pass and not through the backward pass of the layers. Without a gradient 2 N D V.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import chunks
from pallas_kernels.linear_cross_entropy.chunked import own
from pallas_kernels.linear_cross_entropy.reference import Loss, combine, loss_of, over_shards


def total(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Sum of weights[..., T] times losses, float32[] (float64 stays)."""
    loss = loss_of(w, options)
    found = _total(loss, *own(loss, x, w, targets, weights))
    return jax.lax.psum(found, loss.axis_name) if loss.axis_name else found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(loss: Loss, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """This shard's share: shares add up to the sum, and their declared gradients to the gradient."""
    return _shares(chunks.look(x, w, targets, loss), targets, weights, loss)[0]


def _shares(chunk: chunks.Chunk, targets: jax.Array, weights: jax.Array, loss: Loss) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A shard's share of the weighted sum, of each loss, and the whole vocabulary's lse, which the first shard owns."""
    lse = over_shards(chunk.lse, loss)
    owned = lse if loss.axis_name is None else jnp.where(jax.lax.axis_index(loss.axis_name) == 0, lse, 0.0)
    shares = combine(owned, chunk.part, targets, loss)
    return jnp.sum(shares * weights.astype(shares.dtype)), shares, lse


def _forward(loss: Loss, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    chunk = chunks.look(x, w, targets, loss)
    share, shares, lse = _shares(chunk, targets, weights, loss)
    counted = weights.astype(lse.dtype)
    counted = counted if loss.ignore_index is None else jnp.where(targets == loss.ignore_index, 0.0, counted)
    of_lse = counted * (1 + 2 * loss.z_loss * lse) if loss.z_loss else counted
    g = chunks.logits_gradient(chunk, lse, targets, of_lse, -counted, loss).astype(x.dtype)
    dx, dw = chunks.input_gradient(g, w, loss).astype(x.dtype), chunks.weight_gradient(x, g, loss)
    return share, (dx, dw, shares, jnp.zeros((0,), w.dtype), jnp.zeros((0,), weights.dtype))


def _backward(loss: Loss, saved: Any, g: jax.Array) -> Any:
    dx, dw, shares, of_w, of_weights = saved
    scaled = [(g * one.astype(g.dtype)).astype(like.dtype) for one, like in ((dx, dx), (dw, of_w), (shares, of_weights))]
    return scaled[0], scaled[1], None, scaled[2]


_total.defvjp(_forward, _backward)
