"""The definition of both norms, in float32 (float64 stays), with the residual added first.

h = x + residual;  RMSNorm: y = h rsqrt(mean(h^2) + eps) scale;  LayerNorm: y = (h - mean(h)) rsqrt(var(h) + eps) scale + bias.
"""

from typing import Any

import jax
import jax.numpy as jnp


def added(x: jax.Array, residual: jax.Array | None) -> jax.Array:
    """x + residual, rounded to x's dtype as it is stored."""
    if residual is None:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + residual.astype(wide)).astype(x.dtype)


def norm(*arrays: jax.Array, has_residual: bool, centred: bool, has_bias: bool, eps: float) -> tuple[Any, ...]:
    """(y, h): arrays are x, then residual, scale and bias, where there are any."""
    x, residual, scale, bias = named(arrays, has_residual, has_bias)
    h = added(x, residual)
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    centre = jnp.mean(wide, axis=-1, keepdims=True) if centred else 0.0
    off = wide - centre
    y = off * jax.lax.rsqrt(jnp.mean(off * off, axis=-1, keepdims=True) + eps) * scale.astype(wide.dtype)
    y = y if bias is None else y + bias.astype(wide.dtype)
    return y.astype(x.dtype), h


def named(arrays: tuple[jax.Array, ...], has_residual: bool, has_bias: bool) -> tuple[Any, Any, Any, Any]:
    """x, residual, scale, bias, with None for what is not there."""
    left = iter(arrays)
    x = next(left)
    residual = next(left) if has_residual else None
    scale = next(left)
    return x, residual, scale, next(left) if has_bias else None
