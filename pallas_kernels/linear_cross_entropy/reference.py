"""The definition: logits, then cross-entropy, written out.

Shapes: x[..., T, D], w[D, V] or w[V, D] (`vocab_dim` says where V is), targets[..., T]. Of V, `vocab_size` columns are real.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
    """What is summed over the vocabulary. With l the logits, lse their log-sum-exp, e `label_smoothing`, V the vocabulary:

    loss = lse - (1 - e) l[target] - e mean_V(l) + z_loss lse^2;   0 where target == ignore_index.
    """

    vocab_dim: int = 1
    vocab_size: int | None = None  # real columns; the rest is padding and enters no sum
    label_smoothing: float = 0.0  # Szegedy et al., Rethinking the Inception Architecture, 2016
    z_loss: float = 0.0  # Chowdhery et al., PaLM, 2022
    ignore_index: int | None = None
    soft_cap: float | None = None  # l = cap tanh(raw / cap): Gemma Team, Gemma 2, 2024
    axis_name: str | None = None  # the mesh axis that splits V, inside shard_map
    shard_size: int = 0  # columns of one shard of it
    num_real: int = 0  # columns of the whole vocabulary


def loss_of(w: jax.Array, options: dict[str, Any]) -> Loss:
    """The options with the vocabulary's sizes, from one shard's w."""
    loss = Loss(**{name: value for name, value in options.items() if name != "num_chunks"})
    here = w.shape[loss.vocab_dim]
    if loss.axis_name is None:
        return loss._replace(num_real=loss.vocab_size or here)
    return loss._replace(shard_size=here, num_real=loss.vocab_size or here * jax.lax.axis_size(loss.axis_name))


def _offset(loss: Loss) -> Any:
    return jax.lax.axis_index(loss.axis_name) * loss.shard_size


def logits_of(x: jax.Array, w: jax.Array, loss: Loss, first: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Soft-capped logits[..., T, V] in float32 (float64 stays), padding at -inf; and the vocabulary's index of each column.

    `w` may be the part of this shard's that begins at column `first`.
    """
    contract = "...d,dv->...v" if loss.vocab_dim == 1 else "...d,vd->...v"
    logits = jnp.einsum(contract, x, w)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if loss.soft_cap is not None:
        logits = loss.soft_cap * jnp.tanh(logits / loss.soft_cap)
    columns = jnp.arange(logits.shape[-1]) + (first if loss.axis_name is None else first + _offset(loss))
    if loss.vocab_size is not None:
        logits = jnp.where(columns < loss.vocab_size, logits, -jnp.inf)
    return logits, columns


def over_shards(lse: jax.Array, loss: Loss) -> jax.Array:
    """The log-sum-exp of the shards' log-sum-exps."""
    if not loss.axis_name:
        return lse
    largest = jax.lax.pmax(jax.lax.stop_gradient(lse), loss.axis_name)
    return largest + jnp.log(jax.lax.psum(jnp.exp(lse - largest), loss.axis_name))


def picked(logits: jax.Array, columns: jax.Array, targets: jax.Array, loss: Loss) -> jax.Array:
    """What is subtracted from lse, this shard's part: (1 - e) l[target] + e mean_V(l).

    The target is found by comparison, not by a gather: that fuses with the softmax, and so does its gradient.
    """
    hit = columns == targets[..., None]
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    if not loss.label_smoothing:
        return chosen
    total = jnp.sum(jnp.where(jnp.isfinite(logits), logits, 0.0), axis=-1)
    return (1 - loss.label_smoothing) * chosen + loss.label_smoothing / loss.num_real * total


def combine(lse: jax.Array, part: jax.Array, targets: jax.Array, loss: Loss) -> jax.Array:
    """Losses[..., T] from the whole vocabulary's lse and picked logits."""
    losses = lse - part + (loss.z_loss * lse**2 if loss.z_loss else 0.0)
    return losses if loss.ignore_index is None else jnp.where(targets == loss.ignore_index, 0.0, losses)


def losses(x: jax.Array, w: jax.Array, targets: jax.Array, **options: Any) -> jax.Array:
    """Losses[..., T], with the logits in memory; JAX differentiates it."""
    loss = loss_of(w, options)
    logits, columns = logits_of(x, w, loss)
    part = picked(logits, columns, targets, loss)
    part = jax.lax.psum(part, loss.axis_name) if loss.axis_name else part
    return combine(over_shards(jax.nn.logsumexp(logits, axis=-1), loss), part, targets, loss)


def total(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    """Sum of weights[..., T] times losses."""
    found = losses(x, w, targets, **options)
    return jnp.sum(found * weights.astype(found.dtype))
