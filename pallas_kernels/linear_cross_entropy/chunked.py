"""Chunked forms in XLA's own operations: logits of one chunk of tokens at a time, forward and backward.

`losses` gives one loss per token, whose cotangents may be anything, so its backward pass computes the logits again: 8 N D V
operations where the plain form has 6. `total` gives the weighted sum, of which the cotangent is one number: the forward pass
leaves the gradients behind, as Liger does (Hsu et al., Liger Kernel, 2024), at 6 N D V; without a gradient 2 N D V.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import chunks
from pallas_kernels.linear_cross_entropy.reference import Loss, combine, over_shards


def split_options(options: dict[str, Any], x: jax.Array, w: jax.Array) -> tuple[Loss, int]:
    """The loss, and how many chunks."""
    options = dict(options)
    asked = options.pop("num_chunks", None)
    loss = Loss(**options)
    vocab, length = w.shape[loss.vocab_dim], x.shape[-2]
    return loss, asked or chunks.num_chunks_for(length, vocab, x.dtype.itemsize)


def losses(x: jax.Array, w: jax.Array, targets: jax.Array, **options: Any) -> jax.Array:
    """Losses[..., T] in float32."""
    loss, num_chunks = split_options(options, x, w)
    x = _varying(x, loss)
    lse, part = _statistics(loss, num_chunks, loss.num_real(w), x, w, targets)
    part = jax.lax.psum(part, loss.axis_name) if loss.axis_name else part
    return combine(over_shards(lse, loss), part, targets, loss)


def total(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Sum of weights[..., T] times losses, float32[]."""
    loss, num_chunks = split_options(options, x, w)
    found = _total(loss, num_chunks, loss.num_real(w), _varying(x, loss), w, targets, weights)
    return jax.lax.psum(found, loss.axis_name) if loss.axis_name else found


def _varying(x: jax.Array, loss: Loss) -> jax.Array:
    """x as each shard's own, so that JAX adds up over shards what each finds of its gradient."""
    if loss.axis_name is None or loss.axis_name in getattr(jax.typeof(x), "vma", ()):
        return x
    return jax.lax.pcast(x, loss.axis_name, to="varying")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _statistics(
    loss: Loss, num_chunks: int, size: int, x: jax.Array, w: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """This shard's log-sum-exp and picked logits, per token."""
    found, after = [], None
    for cut in chunks.cuts(x.shape[-2], num_chunks):
        here = _in_turn(x[..., cut, :], after)
        chunk = chunks.look(here, w, targets[..., cut], loss)
        found.append((chunk.lse, chunk.part))
        after = chunk.lse
    lses, parts = zip(*found, strict=True)
    return jnp.concatenate(lses, axis=-1), jnp.concatenate(parts, axis=-1)


def _statistics_forward(loss: Loss, num_chunks: int, size: int, x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
    lse, part = _statistics(loss, num_chunks, size, x, w, targets)
    return (lse, part), (x, w, targets, lse)


def _statistics_backward(loss: Loss, num_chunks: int, size: int, saved: Any, cotangents: Any) -> Any:
    x, w, targets, lse = saved
    dxs, dw = [], None
    for cut in chunks.cuts(x.shape[-2], num_chunks):
        here = _in_turn(x[..., cut, :], dw)
        chunk = chunks.look(here, w, targets[..., cut], loss)
        of_lse, of_part = (cotangent[..., cut] for cotangent in cotangents)
        g = chunks.logits_gradient(chunk, lse[..., cut], targets[..., cut], of_lse, of_part, loss, size).astype(x.dtype)
        dxs.append(chunks.input_gradient(g, w, loss))
        dw = _added(dw, chunks.weight_gradient(here, g, loss))
    return jnp.concatenate(dxs, axis=-2).astype(x.dtype), dw.astype(w.dtype), None


_statistics.defvjp(_statistics_forward, _statistics_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _total(
    loss: Loss, num_chunks: int, size: int, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """This shard's share: shares add up to the sum, and their declared gradients to the gradient."""
    lse, part = _statistics(loss, num_chunks, size, x, w, targets)
    return _share(lse, part, targets, weights, loss)[0]


def _share(
    lse: jax.Array, part: jax.Array, targets: jax.Array, weights: jax.Array, loss: Loss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A shard's share of the weighted sum, the losses without weights, and the whole vocabulary's lse."""
    whole = over_shards(lse, loss)
    first = jax.lax.axis_index(loss.axis_name) == 0 if loss.axis_name else True
    shares = combine(jnp.where(first, whole, 0.0), part, targets, loss)
    return jnp.sum(shares * weights.astype(shares.dtype)), shares, whole


def _total_forward(
    loss: Loss, num_chunks: int, size: int, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array
) -> Any:
    found, dxs, dw = [], [], None
    for cut in chunks.cuts(x.shape[-2], num_chunks):
        here, of = _in_turn(x[..., cut, :], dw), targets[..., cut]
        chunk = chunks.look(here, w, of, loss)
        share, shares, lse = _share(chunk.lse, chunk.part, of, weights[..., cut], loss)
        counted = weights[..., cut].astype(lse.dtype)
        counted = counted if loss.ignore_index is None else jnp.where(of == loss.ignore_index, 0.0, counted)
        of_lse = counted * (1 + 2 * loss.z_loss * lse) if loss.z_loss else counted
        g = chunks.logits_gradient(chunk, lse, of, of_lse, -counted, loss, size).astype(x.dtype)
        dxs.append(chunks.input_gradient(g, w, loss))
        dw = _added(dw, chunks.weight_gradient(here, g, loss))
        found.append((share, shares))
    dx, kept = jnp.concatenate(dxs, axis=-2).astype(x.dtype), jnp.concatenate([shares for _, shares in found], axis=-1)
    # A sum over all tokens may pass float16's largest number before it is divided by their count: keep it in float32.
    dw = dw if w.dtype == jnp.float16 else dw.astype(w.dtype)
    return sum(share for share, _ in found), (dx, dw, kept, jnp.zeros((0,), w.dtype), jnp.zeros((0,), weights.dtype))


def _total_backward(loss: Loss, num_chunks: int, size: int, saved: Any, g: jax.Array) -> Any:
    dx, dw, shares, of_w, of_weights = saved
    scaled = [(g * one.astype(g.dtype)).astype(like.dtype) for one, like in ((dx, dx), (dw, of_w), (shares, of_weights))]
    return scaled[0], scaled[1], None, scaled[2]


_total.defvjp(_total_forward, _total_backward)


def _added(total: jax.Array | None, more: jax.Array) -> jax.Array:
    return more if total is None else total + more


def _in_turn(x: jax.Array, after: jax.Array | None) -> jax.Array:
    """`x`, not to be looked at before `after` is there: one chunk's logits at a time."""
    return x if after is None else jax.lax.optimization_barrier((x, after))[0]
