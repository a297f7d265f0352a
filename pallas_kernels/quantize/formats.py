"""The small numbers: what each can say, and its code from a float32 and back, by arithmetic that every device has.

Codes are made from the bits of a float32, not by a device's conversion: TPU v5e has none for 8-bit floats, a GPU's saturates, none
rounds stochastically. Nearest means ties to even, as IEEE 754 and `astype` have it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rounding
from pallas_kernels.quantize import dynamic_map

_SHIFTER = np.float32(2**23)  # added to a float32 below it, it leaves the nearest whole number in the lower bits


class Format(NamedTuple):
    """encode(y, noise) -> int32 code of float32 y in [-top, top]; noise uint32 or None for nearest. decode(code) -> float32."""

    top: float  # the largest magnitude: a block's largest value becomes it
    stored: Any  # dtype of what kernels write
    dtype: Any  # dtype of codes, of as many bits
    encode: Callable[[jax.Array, jax.Array | None], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    pieces: int = 1  # 2: two codes to a byte
    can_round: bool = True  # stochastically


def _bits(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value, jnp.uint32)


def _whole(magnitude: jax.Array, noise: jax.Array | None) -> jax.Array:
    """A magnitude below 2^22 as a whole number, int32."""
    if noise is None:
        return (_bits(magnitude + _SHIFTER) & np.uint32(0x7FFFFF)).astype(jnp.int32)
    return (magnitude + rounding.unit(noise)).astype(jnp.int32)


def _encode_integer(top: int, y: jax.Array, noise: jax.Array | None) -> jax.Array:
    code = jnp.minimum(_whole(jnp.abs(y), noise), top)
    return jnp.where(y < 0, -code, code)


def _decode_integer(code: jax.Array) -> jax.Array:
    return code.astype(jnp.float32)


def _encode_float(mantissa: int, least: int, top_code: int, y: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Sign, exponent and mantissa of a float of 8 bits.

    A normal number's are the upper bits of the float32's, with another bias; below 2^least lie subnormal ones, whole numbers of
    2^(least - mantissa), whose codes go on without a gap.
    """
    magnitude = jnp.abs(y)
    raw, shift = _bits(magnitude), 23 - mantissa
    if noise is None:
        added = ((raw >> np.uint32(shift)) & np.uint32(1)) + np.uint32(2 ** (shift - 1) - 1)
    else:
        added = noise & np.uint32(2**shift - 1)
    bias = (127 + least - 1) << mantissa  # of the exponent: 2^least has exponent 1
    normal = ((raw + added) >> np.uint32(shift)).astype(jnp.int32) - bias
    small = jnp.minimum(magnitude, np.float32(2.0**least)) * np.float32(2.0 ** (mantissa - least))
    code = jnp.minimum(jnp.where(magnitude < np.float32(2.0**least), _whole(small, noise), normal), top_code)
    return jnp.where(y < 0, code + 128, code)


def _decode_float(mantissa: int, least: int, code: jax.Array) -> jax.Array:
    magnitude = code & 127
    bias = (127 + least - 1) << mantissa
    normal = jax.lax.bitcast_convert_type((magnitude + bias) << (23 - mantissa), jnp.float32)
    small = magnitude.astype(jnp.float32) * np.float32(2.0 ** (least - mantissa))
    value = jnp.where(magnitude < 2**mantissa, small, normal)
    return jnp.where(code >= 128, -value, value)


def _integer(top: int, stored: Any, pieces: int = 1) -> Format:
    return Format(float(top), stored, stored, lambda y, noise: _encode_integer(top, y, noise), _decode_integer, pieces)


def _float(dtype: Any, mantissa: int, least: int, top: float, top_code: int) -> Format:
    return Format(
        top, jnp.uint8, dtype, lambda y, noise: _encode_float(mantissa, least, top_code, y, noise),
        lambda code: _decode_float(mantissa, least, code),
    )  # fmt: skip


def _dynamic(signed: bool) -> Format:
    return Format(
        1.0, jnp.uint8, jnp.uint8, lambda y, noise: dynamic_map.encode(y, signed=signed).astype(jnp.int32),
        lambda code: dynamic_map.decode(code, signed=signed), can_round=False,
    )  # fmt: skip


FORMATS = {
    "int8": _integer(127, jnp.int8),
    "int4": _integer(7, jnp.uint8, pieces=2),
    "float8_e4m3": _float(jnp.float8_e4m3fn, 3, -6, 448.0, 0x7E),
    "float8_e5m2": _float(jnp.float8_e5m2, 2, -14, 57344.0, 0x7B),
    "dynamic": _dynamic(True),
    "dynamic_unsigned": _dynamic(False),
}


def pack(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two int32 codes of 4 bits as one byte."""
    return (low & 15) | ((high & 15) << 4)


def unpack(code: jax.Array) -> tuple[jax.Array, jax.Array]:
    sign = lambda nibble: (nibble ^ 8) - 8
    return sign(code & 15), sign((code >> 4) & 15)
