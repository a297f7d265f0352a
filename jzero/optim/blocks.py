"""An array as bytes and one scale per block, blocks running along a dim that ZeRO leaves alone.

Each block is divided by its largest magnitude, so an outlier spoils the precision of its own block only. A block lies within
one dim of the array. The rule of stages shards the largest dim (ties: the last), so blocks run along the next one:
`W[D, F_data]` has `scales[D / 256, F_data]`, every shard has whole blocks, and neither bytes nor scales travel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import dynamic_map
from pallas_kernels.quantize.cut import blocked, whole

BLOCK = 256  # as bitsandbytes; 4 bytes of scale are then 1.6% of the block
_SHARDS = 8  # a dim that this does not divide, such as a vocabulary of 50,257, is hardly ever sharded
_LEAST = 32  # shorter dims make too many scales; then blocks run along the largest dim itself


class Shape(NamedTuple):
    """How an array is cut: along which dim, and how many elements a block has."""

    dim: int
    block: int
    num_blocks: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Shape":
        """Chosen by the shape alone, so that blocks are the same on every mesh."""
        even = [dim for dim, size in enumerate(shape) if size % _SHARDS == 0] or range(len(shape))
        largest = max(even, key=lambda dim: (shape[dim], dim))
        others = [dim for dim in range(len(shape)) if dim != largest and shape[dim] >= _LEAST]
        dim = max(others, key=lambda dim: (shape[dim], dim), default=largest)
        block = min(BLOCK, shape[dim])
        return cls(dim, block, -(-shape[dim] // block))

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.dim], self.num_blocks, *shape[self.dim + 1 :])


def quantize(values: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """uint8 codes of the array's shape, and float32 scales."""
    cut = Shape.of(values.shape)
    blocks = blocked(values.astype(jnp.float32), cut.dim, cut.block)
    scales = jnp.max(jnp.abs(blocks), axis=cut.dim + 1)
    wide = jnp.expand_dims(scales, cut.dim + 1)
    codes = dynamic_map.encode(blocks / jnp.where(wide > 0, wide, 1), signed=signed)
    return whole(codes, cut.dim, values.shape[cut.dim]), scales


def dequantize(codes: jax.Array, scales: jax.Array, *, signed: bool) -> jax.Array:
    """The values again, float32."""
    cut = Shape.of(codes.shape)
    blocks = dynamic_map.decode(blocked(codes, cut.dim, cut.block), signed=signed)
    return whole(blocks * jnp.expand_dims(scales.astype(jnp.float32), cut.dim + 1), cut.dim, codes.shape[cut.dim])


def num_bytes(shape: tuple[int, ...]) -> int:
    """Of codes and scales."""
    return math.prod(shape) + 4 * math.prod(Shape.of(shape).scales(shape))
