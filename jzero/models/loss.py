"""Next-token cross entropy."""

import jax
import jax.numpy as jnp


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
