"""The same update as one pass over blocks; the kernels of both devices run this body."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockPass, Out, Run, Values
from pallas_kernels.fused_optimizer.call import How, rule_of, seeds_of, stored, streams
from pallas_kernels.fused_optimizer.rules import Rule
from pallas_kernels.quantize import arithmetic
from pallas_kernels.quantize.body import scales_of
from pallas_kernels.quantize.formats import FORMATS

BLOCK = 256  # elements to a warp: 8 of each array to a thread


def block_of(dim: int) -> int | None:
    """How many elements of rows that long the kernels take at a time."""
    return next((size for size in (BLOCK, 128) if dim % size == 0), None)


def _step(rule: Rule, how: How, dtypes: tuple[Any, ...], has_scales: bool, value_dtype: Any, values: Values) -> Any:
    (param,), (grad,), *moments = values.arrays
    p, g = param.astype(jnp.float32), grad.astype(jnp.float32)
    forms = [FORMATS[name] for name in rule.formats]
    if has_scales:
        spread = map(values.along.spread, values.scales)
        held = [
            arithmetic.values_of(codes.astype(jnp.int32), scale, form)
            for (codes,), scale, form in zip(moments, spread, forms, strict=True)
        ]
    else:
        held = [moment.astype(jnp.float32) for (moment,) in moments]
    by, made = rule.step(g, p, held, how.numbers(values.numbers))
    halves = streams(values.places[0], values.seeds) if values.seeds else ((None, None), (None, None))
    kept, scales = [], []
    for new, form, dtype, noise in zip(made, forms, dtypes, halves[0], strict=False):
        if has_scales:
            scale, factor = scales_of(values, [new], form)
            kept.append([arithmetic.codes_of(new, values.along.spread(factor), form, None)])
            scales.append(scale)
        else:
            kept.append([stored(new, dtype, noise)])
    new = p + by
    value = stored(new if how.returns == "params" else by, value_dtype, halves[1][0])
    return [[value], *kept, *([[stored(new, how.copy, halves[1][1])]] if how.copy is not None else [])], scales


def update(run: Run, name: str, *arrays: jax.Array, interpret: bool, **options: Any) -> tuple[jax.Array, ...]:
    rule, how = rule_of(name), How(**options)
    param, grad, moments, scales, numbers, seed = how.given(rule, arrays)
    length = row_length(param.shape, has_scales=bool(scales)) or 0
    rows = [_rows(array, length) for array in (param, grad, *moments)]
    block = how.block if scales else block_of(length)
    assert block is not None  # `_fits` of the dispatch
    dtypes, value_dtype = tuple(moment.dtype for moment in moments), how.value_dtype(param)
    outs = [value_dtype, *dtypes, *([how.copy] if how.copy is not None else [])]
    noisy = how.needs_noise(param, moments)
    body = partial(_step, rule, how, dtypes, bool(scales), value_dtype)
    in_place = tuple((2 + index, 1 + index) for index in range(len(moments)))
    in_place += ((0, 0),) if how.returns == "params" else ()
    one = BlockPass(body, block, block, [Out(dtype, block) for dtype in outs], len(scales), noisy, in_place)
    found = run(
        one, rows, [_rows(scale, scale.shape[-1]) for scale in scales], jnp.stack(numbers).astype(jnp.float32) if numbers else
        None, jnp.stack(seeds_of(seed)) if noisy else None, interpret=interpret,
    )  # fmt: skip
    value, *kept = [array.reshape(param.shape) for array in found[: len(outs)]]
    more = [array.reshape(scale.shape) for array, scale in zip(found[len(outs) :], scales, strict=True)]
    return value, *kept[: len(moments)], *more, *kept[len(moments) :]


def row_length(shape: tuple[int, ...], *, has_scales: bool) -> int | None:
    """Of the rows that an array is seen as: its last dim, or where that is no whole number of blocks, a part of all elements.

    On a TPU the latter moves the array, so the last dim comes first.
    """
    if has_scales or (len(shape) > 1 and block_of(shape[-1])):
        return shape[-1]
    size = math.prod(shape)
    return next((length for length in (2048, 1024, 512, 256, 128) if size and size % length == 0), None)


def _rows(array: jax.Array, length: int) -> jax.Array:
    return array.reshape(-1, length)
