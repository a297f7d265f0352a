"""Which keys a query sees."""

from typing import Any

import jax


def visible(
    of_queries: jax.Array, of_keys: jax.Array, *, causal: bool, sliding_window: int | None
) -> jax.Array | None:  # fmt: skip
    """bool[T, S] by places in the sequence: no later keys if causal, and of a window only the keys less than that far away."""
    away = of_queries[:, None] - of_keys[None, :]
    mask = away >= 0 if causal else None
    if sliding_window is None:
        return mask
    near = away < sliding_window
    return mask & near if mask is not None else near & (away > -sliding_window)


def same_segment(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """bool[B, T, S]"""
    return of_queries[:, :, None] == of_keys[:, None, :]


def both(mask: Any, other: Any) -> Any:
    """Where both see, None seeing everything."""
    if mask is None or other is None:
        return mask if other is None else other
    return mask & other
