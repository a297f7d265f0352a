"""The definition: each block divided by its largest magnitude over the format's, then the nearest code, or one of its neighbours.

scale = max |x| / top,   code = round(x / scale),   value = code * scale
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import rounding
from pallas_kernels.quantize import arithmetic
from pallas_kernels.quantize.cut import blocked, whole
from pallas_kernels.quantize.formats import FORMATS, pack, unpack


def quantize(
    *arrays: jax.Array, format: str, block: int, dim: int, is_stochastic: bool, has_error: bool
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Codes, scales, and with an error what is left over; arrays are x, the error and a seed where there are any."""
    x, error, seed = named(arrays, has_error, is_stochastic)
    form, size = FORMATS[format], x.shape[dim]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    full = x.astype(wide) if error is None else x.astype(wide) + error.astype(wide)
    cut = blocked(full, dim, block)
    scales, factor = arithmetic.scale_of(jnp.max(arithmetic.magnitude(cut), axis=dim + 1), form)
    # Noise by the place in the array, as the kernels have it: blocks filled up move nothing.
    noise = None if seed is None else blocked(rounding.bits(rounding.places(x.shape), seed), dim, block)
    codes = arithmetic.codes_of(cut, jnp.expand_dims(factor, dim + 1), form, noise)
    stored = packed(codes, dim) if form.pieces == 2 else whole(codes, dim, size).astype(form.stored)
    if error is None:
        return stored, scales
    values = whole(arithmetic.values_of(codes, jnp.expand_dims(scales, dim + 1), form), dim, size)
    return stored, scales, left_over(full, values, error.astype(wide)).astype(error.dtype)


def dequantize(
    codes: jax.Array, scales: jax.Array, *, format: str, block: int, dim: int, size: int, dtype: Any
) -> jax.Array:  # fmt: skip
    """The values again. Arithmetic in the scales' dtype."""
    form = FORMATS[format]
    if form.pieces == 2:
        cut = jnp.concatenate(unpack(blocked(codes, dim, block // 2).astype(jnp.int32)), axis=dim + 1)
    else:
        cut = blocked(codes, dim, block).astype(jnp.int32)
    return whole(arithmetic.values_of(cut, jnp.expand_dims(scales, dim + 1), form), dim, size).astype(dtype)


def packed(codes: jax.Array, dim: int) -> jax.Array:
    """Half a byte each: a block's first half in the lower bits, its second in the upper ones."""
    low, high = jnp.split(codes, 2, axis=dim + 1)
    both = pack(low, high).astype(jnp.uint8)
    return whole(both, dim, both.shape[dim] * both.shape[dim + 1])


def left_over(full: jax.Array, values: jax.Array, error: jax.Array) -> jax.Array:
    """What the codes leave out; where a block has a value that is not finite, the error stays what it was."""
    return jnp.where(jnp.abs(values) < jnp.inf, full - values, error)


def named(arrays: tuple[jax.Array, ...], has_error: bool, is_stochastic: bool) -> tuple[Any, Any, Any]:
    """x, error, seed, with None for what is not there."""
    left = iter(arrays)
    return next(left), next(left) if has_error else None, next(left) if is_stochastic else None
