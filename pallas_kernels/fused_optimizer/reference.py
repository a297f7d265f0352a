"""The definition, element by element, on leaves of any shape: XLA makes one pass of it, split as its operands are."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import rounding
from pallas_kernels.fused_optimizer.call import How, rule_of, seeds_of, stored, streams
from pallas_kernels.quantize import reference as blockwise


def update(name: str, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    """(updates or params, *moments, *scales, copy if asked)."""
    rule, how = rule_of(name), How(**options)
    param, grad, moments, scales, numbers, seed = how.given(rule, arrays)
    wide = jnp.promote_types(param.dtype, jnp.float32)
    p, g = param.astype(wide), grad.astype(wide)
    if scales:
        size = param.shape[how.dim]
        back = partial(blockwise.dequantize, block=how.block, dim=how.dim, size=size, dtype=wide)
        held = [back(*each, format=form) for *each, form in zip(moments, scales, rule.formats, strict=True)]
    else:
        held = [moment.astype(wide) for moment in moments]
    by, made = rule.step(g, p, held, how.numbers([number.astype(wide) for number in numbers]))
    noisy = how.needs_noise(param, moments)
    (*of_moments,), (of_value, of_copy) = streams(rounding.places(param.shape), seeds_of(seed)) if noisy else ((None,) * 2,) * 2
    if scales:
        pack = partial(blockwise.quantize, block=how.block, dim=how.dim, is_stochastic=False, has_error=False)
        pairs = [pack(one, format=form) for one, form in zip(made, rule.formats, strict=True)]
        kept = [*(codes for codes, _ in pairs), *(scale for _, scale in pairs)]
    else:
        kept = [stored(new, old.dtype, more) for new, old, more in zip(made, moments, of_moments, strict=False)]
    new = p + by
    value = stored(new if how.returns == "params" else by, how.value_dtype(param), of_value)
    return value, *kept, *([stored(new, how.copy, of_copy)] if how.copy is not None else [])
