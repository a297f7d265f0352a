"""Quantize and dequantize as one pass over blocks; the kernels of both devices run these bodies.

Codes of a block do not depend on how blocks are grouped: noise comes from an element's place.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import rounding
from pallas_kernels.blocks import BlockPass, Out, Run, Values
from pallas_kernels.quantize import arithmetic
from pallas_kernels.quantize.formats import FORMATS, Format, pack, unpack
from pallas_kernels.quantize.reference import left_over, named


def _wide(pieces: Sequence[Any]) -> list[Any]:
    return [piece.astype(jnp.float32) for piece in pieces]


def _quantize(form: Format, has_error: bool, values: Values) -> Any:
    full, error = _wide(values.arrays[0]), _wide(values.arrays[1]) if has_error else []
    full = [one + more for one, more in zip(full, error, strict=True)] if has_error else full
    scale, factor = scales_of(values, full, form)
    factor = values.along.spread(factor)
    noise = [rounding.bits(place, values.seeds[0]) for place in values.places] if values.seeds else [None] * len(full)
    codes = [arithmetic.codes_of(piece, factor, form, more) for piece, more in zip(full, noise, strict=True)]
    outs = [[pack(*codes)] if form.pieces == 2 else codes]
    if has_error:
        back = [arithmetic.values_of(code, values.along.spread(scale), form) for code in codes]
        outs.append([left_over(*each) for each in zip(full, back, error, strict=True)])
    return outs, [scale]


def scales_of(values: Values, pieces: Sequence[Any], form: Format) -> tuple[Any, Any]:
    """Scale and factor of each block."""
    largest = [values.along.largest(arithmetic.magnitude(piece)) for piece in pieces]
    return arithmetic.scale_of(largest[0] if len(largest) == 1 else jnp.maximum(*largest), form)


def _dequantize(form: Format, values: Values) -> Any:
    (codes,), scale = values.arrays[0], values.along.spread(values.scales[0])
    codes = codes.astype(jnp.int32)
    return [[arithmetic.values_of(code, scale, form) for code in (unpack(codes) if form.pieces == 2 else [codes])]], []


def quantize(
    run: Run, *arrays: jax.Array, format: str, block: int, dim: int, is_stochastic: bool, has_error: bool, interpret: bool
) -> tuple[jax.Array, ...]:
    x, error, seed = named(arrays, has_error, is_stochastic)
    form, rows = FORMATS[format], [_rows(array) for array in (x, error) if array is not None]
    outs = [Out(form.stored, block // form.pieces), *[Out(array.dtype, block) for array in (error,) if array is not None]]
    body = partial(_quantize, form, has_error)
    one = BlockPass(body, block, block // form.pieces, outs, num_scales=1, needs_places=is_stochastic)
    found = run(one, rows, seeds=seed.reshape(1) if is_stochastic else None, interpret=interpret)
    codes, *left, scales = [array.reshape(*x.shape[:-1], -1) for array in found]
    return codes, scales, *left


def dequantize(
    run: Run, codes: jax.Array, scales: jax.Array, *, format: str, block: int, dim: int, size: int, dtype: Any, interpret: bool
) -> jax.Array:  # fmt: skip
    form = FORMATS[format]
    one = BlockPass(partial(_dequantize, form), block, block // form.pieces, [Out(dtype, block)])
    (values,) = run(one, [_rows(codes)], [_rows(scales)], interpret=interpret)
    return values.reshape(*codes.shape[:-1], size)


def _rows(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])
