"""The dynamic 8-bit number: a decade and a linear fraction within it, relative precision for small values, absolute for large.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 1.3 (and Dettmers, 8-bit Approximations, 2016).
Values lie in [-1, 1] after division by their block's largest magnitude. With m a magnitude's code and i = floor(log2(m)):

    signed:    m in 1..127:  10^(i - 6) * (0.1 + 0.9 * (m - 2^i + 0.5) / 2^i)              m = 0: 0, m = 128: 1
    unsigned:  the same of m + 1, with decades of twice as many values                       m = 0: 0, m = 255: 1

Codes are bytes: the magnitude's code for unsigned numbers, 127 plus or minus it for signed ones. Seven decades, 1e-7 to 1. The
map is computed and not looked up, which a vector unit does without gathers.
"""

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

NUM_DECADES = 7
_TOP = {True: 128, False: 255}  # the code of 1
_SCALES = tuple(10.0 ** (i - NUM_DECADES + 1) for i in range(NUM_DECADES))  # of the decades, 1e-6 to 1


def encode(values: jax.Array, *, signed: bool) -> jax.Array:
    """Codes of values in [-1, 1] (unsigned: [0, 1]), uint8. In the decade that a magnitude lies in, its nearest value.

    An unsigned number that is not zero never becomes zero: a second moment of zero would divide by nothing but epsilon.
    """
    magnitude = jnp.abs(values.astype(jnp.float32))
    decade = _count(magnitude >= scale for scale in _SCALES[:-1])
    scale, count = _select(decade, _SCALES), jnp.left_shift(1, decade + (not signed))
    offset = ((magnitude / scale - 0.1) / 0.9 * count).astype(jnp.int32)  # cut off; what is below 0 is clipped
    code = count + jnp.clip(offset, 0, count - 1) - (not signed)
    half_step = 0.45 / 2 ** (NUM_DECADES - (1 if signed else 0))
    code = jnp.where(magnitude >= 1 - half_step / 2, _TOP[signed], code)
    is_zero = magnitude < _SCALES[0] * 0.55 / 2 if signed else magnitude <= 0
    code = jnp.where(is_zero, 0, code)
    return (127 + jnp.where(values < 0, -jnp.minimum(code, 127), code) if signed else code).astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """The values that codes stand for, float32."""
    code = codes.astype(jnp.int32) - (127 if signed else 0)
    index = jnp.abs(code) + (not signed)
    decade = _count(index >= 2 ** (i + (not signed)) for i in range(1, NUM_DECADES))
    count = jnp.left_shift(1, decade + (not signed))
    magnitude = _select(decade, _SCALES) * (0.1 + 0.9 * ((index - count).astype(jnp.float32) + 0.5) / count)
    magnitude = jnp.where(jnp.abs(code) == _TOP[signed], 1.0, jnp.where(code == 0, 0.0, magnitude))
    return jnp.where(code < 0, -magnitude, magnitude)


def _count(flags: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, (flag.astype(jnp.int32) for flag in flags))


def _select(decade: jax.Array, choices: tuple[float, ...]) -> jax.Array:
    found = jnp.full(decade.shape, choices[0], jnp.float32)
    for index, value in enumerate(choices[1:], 1):
        found = jnp.where(decade >= index, np.float32(value), found)
    return found
