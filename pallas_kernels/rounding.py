"""Stochastic rounding by position: noise that is a function of an element's place and a seed, and what adds it.

Noise by counter needs no state and no memory: reference and kernels, one device and many, any tiling, all round an element alike.
Rounded up or down with probability by distance, a value keeps its mean (Gupta et al., Deep Learning with Limited Numerical
Precision, 2015).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: consecutive numbers land far apart


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit depends on every bit: two multiplications.

    Wellons, Prospecting for Hash Functions, 2018 ("lowbias32": each input bit flips each output bit with probability 1/2 to 0.0008).
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def fold(seed: Any, *numbers: Any) -> jax.Array:
    """A seed for each of some numbers (a leaf's index, a step's), uint32[]."""
    seed = jnp.asarray(seed).astype(jnp.uint32)
    for number in numbers:
        seed = mix(seed * _GOLDEN + jnp.asarray(number).astype(jnp.uint32))
    return mix(seed + _GOLDEN)


def bits(place: jax.Array, seed: Any) -> jax.Array:
    """32 random bits for each place. `seed` is one that `fold` made: of raw counters, neighbours would share a noise moved about."""
    return mix(place ^ seed)


def places(shape: tuple[int, ...]) -> jax.Array:
    """The flat index of every element modulo 2^32, without a reshape, so that it is made shard by shard."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(len(shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(stride % 2**32)
        stride *= shape[dim]
    return place


def unit(noise: jax.Array) -> jax.Array:
    """The upper 24 bits as a float32 in [0, 1)."""
    return (noise >> np.uint32(8)).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-24)


def to_bfloat16(value: jax.Array, noise: jax.Array) -> jax.Array:
    """A float32 rounded to a neighbour in bfloat16 by 16 bits of noise (uint32, the upper half zero). Infinities and NaN pass.

    bfloat16 is float32's upper half: noise is added below it, and the lower half cut off.
    """
    raw = jax.lax.bitcast_convert_type(value, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raw + noise) & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.abs(value) < np.float32(np.inf), rounded, value).astype(jnp.bfloat16)
