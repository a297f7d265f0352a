"""Next-token cross entropy."""

import jax

import pallas_kernels


def next_token_loss(
    x: jax.Array, w: jax.Array, targets: jax.Array, *, vocab_dim: int, vocab_size: int, implementation: str | None = None
) -> jax.Array:
    """Mean of -log p(target) in float32, where the logits are x[B, T, D] times w: [V', D] if `vocab_dim` is 0, else [D, V'].

    Rows or columns of w from `vocab_size` on are padding. `implementation=None` chooses; "reference" keeps all logits for the
    backward pass, "fused" none, "chunked" makes an eighth of them at a time, twice (`pallas_kernels.linear_cross_entropy_sum`).
    """
    total = pallas_kernels.linear_cross_entropy_sum(
        x, w, targets, vocab_dim=vocab_dim, vocab_size=vocab_size, implementation=implementation
    )
    return total / targets.size
