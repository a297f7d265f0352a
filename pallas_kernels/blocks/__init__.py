"""One pass over an array in blocks of its rows, as a TPU or a GPU kernel, with a number per block in and out.

A body is plain jnp on the values of some blocks. A TPU takes a block's columns of a tile of rows [R, w], a GPU a warp for each of four
blocks [4, w]; `Along` says how to reduce along a block and how to spread a number over it again. Quantizers and optimizers run
in it: what they hold in 8 bits needs each block's scale.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rows import Along

Run = Callable[..., list[jax.Array]]  # blocks.tpu.run or blocks.gpu.run
MOST = 2048  # elements of a block: 64 to a thread of a GPU


class Out(NamedTuple):
    """An output of as many elements for each block."""

    dtype: Any
    width: int


class Values(NamedTuple):
    """What a body sees of some blocks."""

    along: Along
    arrays: Sequence[Sequence[Any]]  # of each input array, its pieces of `piece` columns
    scales: Sequence[Any]  # of each input with one number per block
    numbers: Sequence[Any]  # float32 scalars
    seeds: Sequence[Any]  # uint32 scalars
    places: Sequence[Any]  # per piece of a whole block: the flat index of its elements, uint32; empty unless asked for


class BlockPass(NamedTuple):
    """`body(values) -> (outs, scales)`: a list of pieces for each of `outs`, and a value per block for each of `num_scales`.

    block: elements of one. piece: columns that the body sees at once, the whole block or half of it: two numbers of 4 bits
    share a byte, one from each half, so that nothing moves from lane to lane.
    """

    body: Callable[[Values], tuple[Sequence[Sequence[Any]], Sequence[Any]]]
    block: int
    piece: int
    outs: Sequence[Out]
    num_scales: int = 0
    needs_places: bool = False


def why_not(block: int, piece: int, dim: int, dtypes: Sequence[Any]) -> str | None:
    """Why the kernels cannot take rows of `dim` elements in such blocks, or None."""
    if piece % 128 or block > MOST:
        return f"blocks must be a multiple of {128 * block // piece} up to {MOST} long, these are {block}"
    if dim % block:
        return f"rows must be whole blocks of {block}, these are {dim} long"
    wrong = sorted({str(jnp.dtype(dtype)) for dtype in dtypes} - {"float32", "bfloat16", "float16", "uint8", "int8"})
    return f"float32, bfloat16 and float16 only, not {', '.join(wrong)}" if wrong else None
