"""Blocks on a TPU: tiles [R, G block] through vector memory, a block's columns of all R rows at a time."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import BlockPass, Values
from pallas_kernels.rows import Along

_TILE_ELEMENTS = 2**18  # of one array in a tile: seven float32 arrays, twice each, are 14 MiB of vector memory
_COLUMNS = 2048  # of a tile, at most: as many blocks are written out one after the other in the program
_SUBLANES = 32  # the largest minimum tile, int8's
_ALONG = Along(lambda x: jnp.sum(x, axis=-1, keepdims=True), lambda x: jnp.max(x, axis=-1, keepdims=True))


def tile_of(num_rows: int, num_parts: int, block: int, num_arrays: int) -> tuple[int, int]:
    """Rows and blocks of a row in a tile."""
    parts = next(n for n in range(max(_COLUMNS // block, 1), 0, -1) if num_parts % n == 0)
    fits = 7 * _TILE_ELEMENTS // max(num_arrays, 7) // (parts * block) // _SUBLANES * _SUBLANES
    rows = max(fits, _SUBLANES)
    return (num_rows if num_rows <= rows else rows), parts


def run(
    one: BlockPass, arrays: Sequence[jax.Array], scales: Sequence[jax.Array] = (), numbers: jax.Array | None = None,
    seeds: jax.Array | None = None, *, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """arrays [M, P k piece], scales [M, P], numbers float32[n], seeds uint32[m] -> outputs [M, P width], scales float32[M, P]."""
    num_rows = arrays[0].shape[0]
    num_parts = scales[0].shape[1] if scales else arrays[0].shape[1] // one.block
    tile, parts = tile_of(num_rows, num_parts, one.block, len(arrays) + len(one.outs))
    by_tile = lambda width: pl.BlockSpec((tile, parts * width), lambda i, j: (i, j))
    # All scales of the tile's rows: fewer than 128 columns cannot be cut. They stay while the row's tiles follow each other.
    by_row = pl.BlockSpec((tile, num_parts), lambda i, j: (i, 0))
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    given = [array for array in (numbers, seeds) if array is not None]
    widths = [array.shape[1] // num_parts for array in arrays]

    def kernel(*refs: Any) -> None:
        array_refs, refs = refs[: len(arrays)], refs[len(arrays) :]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        given_refs, refs = refs[: len(given)], refs[len(given) :]
        outs, made_refs = refs[: len(one.outs)], refs[len(one.outs) :]
        scalars = [[ref[i] for i in range(ref.shape[0])] for ref in given_refs]
        first, column = pl.program_id(0) * tile, jax.lax.broadcasted_iota(jnp.int32, (tile, num_parts), 1)
        for part in range(parts):
            number = pl.program_id(1) * parts + part
            is_it = column == number
            start = (first, number * one.block)
            values = Values(
                _ALONG,
                [_pieces(ref, part * width, width, one.piece) for ref, width in zip(array_refs, widths, strict=True)],
                [jnp.sum(jnp.where(is_it, ref[...], 0.0), axis=-1, keepdims=True) for ref in scale_refs],
                scalars[0] if numbers is not None else [],
                scalars[-1] if seeds is not None else [],
                _places(one, start, (tile, one.piece), num_parts * one.block) if one.needs_places else [],
            )
            found, made = one.body(values)
            for ref, pieces, out in zip(outs, found, one.outs, strict=True):
                for index, value in enumerate(pieces):
                    at = part * out.width + index * one.piece
                    ref[:, at : at + one.piece] = value.astype(ref.dtype)
            for ref, value in zip(made_refs, made, strict=True):
                ref[...] = jnp.where(is_it, value, ref[...])

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, tile), num_parts // parts),
        in_specs=[*map(by_tile, widths), *[by_row] * len(scales), *[in_smem] * len(given)],
        out_specs=[*[by_tile(out.width) for out in one.outs], *[by_row] * one.num_scales],
        out_shape=[
            *[jax.ShapeDtypeStruct((num_rows, num_parts * out.width), out.dtype) for out in one.outs],
            *[jax.ShapeDtypeStruct((num_rows, num_parts), jnp.float32)] * one.num_scales,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if one.num_scales else "parallel"), vmem_limit_bytes=32 * 2**20
        ),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
    )(*arrays, *scales, *given)


def _pieces(ref: Any, at: int, width: int, piece: int) -> list[jax.Array]:
    return [ref[:, start : start + piece] for start in range(at, at + width, piece)]


def _places(one: BlockPass, start: tuple[Any, Any], shape: tuple[int, int], dim: int) -> list[jax.Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) + start[axis] for axis in (0, 1))
    flat = row * dim + column
    return [(flat + offset).astype(jnp.uint32) for offset in range(0, one.block, one.piece)]
