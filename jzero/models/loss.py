"""Next-token cross entropy."""

import jax
import jax.numpy as jnp

import pallas_kernels


def next_token_loss(logits: jax.Array, targets: jax.Array, *, vocab_size: int) -> jax.Array:
    """Mean of -log p(target) in float32. logits[B, T, V'], targets[B, T]; columns from `vocab_size` on are padding.

    The target's logit is picked with a comparison, not a gather: its gradient is then elementwise and fuses with the softmax's.
    """
    logits = logits.astype(jnp.float32)
    column = jnp.arange(logits.shape[-1])
    if logits.shape[-1] > vocab_size:
        logits = jnp.where(column < vocab_size, logits, -jnp.inf)
    picked = jnp.sum(jnp.where(column == targets[..., None], logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def next_token_loss_without_logits(
    x: jax.Array, w: jax.Array, targets: jax.Array, *, vocab_dim: int, vocab_size: int, implementation: str | None
) -> jax.Array:
    """The same, where the logits are x[B, T, D] times w: [V', D] if `vocab_dim` is 0, else [D, V'].

    `implementation`: "fused" keeps no logits for the backward pass, "chunked" makes an eighth of them at a time, twice,
    "reference" keeps all; None chooses between them (`pallas_kernels.linear_cross_entropy_sum`).
    """
    total = pallas_kernels.linear_cross_entropy_sum(
        x, w, targets, vocab_dim=vocab_dim, vocab_size=vocab_size, implementation=implementation
    )
    return total / targets.size
