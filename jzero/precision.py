"""Precision policies: in which dtype parameters are stored, computed with, sent, summed, and moments kept.

Micikevicius et al.: Mixed Precision Training, 2018 (fp32 master copy, dynamic loss scale).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero._errors import explain, suggest
from jzero._tree import is_float
from pallas_kernels import rounding


class PrecisionPolicy(NamedTuple):
    """Dtypes of one training step.

    Args:
      param: parameters at rest. A 16-bit dtype rounds updates stochastically, or small ones would be lost.
      compute: the working copy, forward and backward pass; the dtype that gathers move. float16 brings a dynamic loss scale.
      reduce: gradients on the wire when they are reduced as they appear (stages 2 and 3).
      accumulate: the sum of gradients over microbatches, and what clipping and the optimizer see.
      moments: the optimizer's floating-point state at rest.
    """

    param: Any = jnp.float32
    compute: Any = jnp.float32
    reduce: Any = jnp.float32
    accumulate: Any = jnp.float32
    moments: Any = jnp.float32

    @property
    def reduce_once(self) -> Any:
        """What gradients travel in when they are reduced once a step (stages 0 and 1): rare, so not below the stored dtype."""
        return jnp.promote_types(self.reduce, self.param)

    @property
    def scales_loss(self) -> bool:
        return jnp.dtype(self.compute) == jnp.float16

    @property
    def rounds_stochastically(self) -> bool:
        return jnp.dtype(self.param).itemsize < 4


PRESETS = {
    "fp32": PrecisionPolicy(),
    "bf16": PrecisionPolicy(compute=jnp.bfloat16, reduce=jnp.bfloat16),
    "fp16": PrecisionPolicy(compute=jnp.float16, reduce=jnp.float16),
    "bf16-pure": PrecisionPolicy(param=jnp.bfloat16, compute=jnp.bfloat16, reduce=jnp.bfloat16, moments=jnp.bfloat16),
}


def get(precision: "str | PrecisionPolicy") -> PrecisionPolicy:
    """A preset by name, or the policy itself, checked."""
    if isinstance(precision, PrecisionPolicy):
        wrong = [f"{name}={value!r}" for name, value in precision._asdict().items() if not _is_float_dtype(value)]
        if wrong:
            raise TypeError(
                explain(
                    "jzero.PrecisionPolicy", "every field is a floating-point dtype", found=wrong, fix="Such as jnp.bfloat16."
                )
            )
        return precision
    if precision not in PRESETS:
        found = [f"precision={precision!r}"]
        fix = "Name a preset or pass jzero.PrecisionPolicy(param, compute, reduce, accumulate, moments)."
        raise ValueError(
            explain("jzero.make_train_step", "unknown precision", found=found, context=suggest(precision, PRESETS), fix=fix)
        )
    return PRESETS[precision]


def _is_float_dtype(value: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves in `dtype`; everything else as it is."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def sum_of_squares(value: jax.Array, *, is_slice: bool = False) -> jax.Array:
    """Of all elements, float32[]: row by row, then within each slice of dim 0, then over these. So there is less rounding than
    in one sweep, and nearly the same where layers' slices have their sums made as they appear. Barriers keep the order.
    """
    squares = jnp.square(value.astype(jnp.float32))
    if not value.ndim:
        return squares
    rows = jax.lax.optimization_barrier(jnp.sum(squares, axis=-1))
    if is_slice or value.ndim < 3:
        return jnp.sum(rows)
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(rows, axis=tuple(range(1, rows.ndim)))))


def round_stochastically(value: jax.Array, dtype: Any, seed: jax.Array) -> jax.Array:
    """`value` (float32) rounded to a neighbour in bfloat16 with probability by distance, so that the mean is kept.

    The noise is a function of an element's index and the seed (of `rounding.fold`), so all shardings round alike. Infinities
    and NaN pass.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return value.astype(dtype)
    noise = rounding.bits(rounding.places(value.shape), seed) >> 16
    return rounding.to_bfloat16(value.astype(jnp.float32), noise)
