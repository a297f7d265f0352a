"""Rows on a TPU: tiles [R, D] through vector memory, one grid step after the other, so sums add up in place."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rows import Along, Pass

_TILE_BYTES = 4 * 2**20  # of all arrays' rows in a tile, in float32: their copies and the arithmetic's stay under 16 MiB
_SUBLANES = 32  # the largest minimum tile, int8's: 8 for float32, 16 for bfloat16
_ALONG = Along(lambda x: jnp.sum(x, axis=-1, keepdims=True), lambda x: jnp.max(x, axis=-1, keepdims=True))


def rows_per_tile(num_rows: int, dim: int, num_arrays: int) -> int:
    """Rows in a tile: a multiple of the largest tile's sublanes, or all of them."""
    fits = _TILE_BYTES // (4 * dim * num_arrays) // _SUBLANES * _SUBLANES
    return num_rows if num_rows <= max(fits, _SUBLANES) else max(fits, _SUBLANES)


def run(one: Pass, rows: Sequence[jax.Array], shared: Sequence[jax.Array] = (), *, interpret: bool = False) -> list[jax.Array]:
    """Outputs [N, D], then sums float32[D]."""
    num_rows, dim = rows[0].shape
    tile = rows_per_tile(num_rows, dim, len(rows) + len(one.outs) + 2)
    by_tile, whole = pl.BlockSpec((tile, dim), lambda i: (i, 0)), pl.BlockSpec((1, dim), lambda i: (0, 0))

    def kernel(*refs: Any) -> None:
        ins, outs = refs[: len(rows) + len(shared)], refs[len(rows) + len(shared) :]
        values = [ref[...] for ref in ins]
        index = pl.program_id(0) * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, dim), 0)
        place = _place(index, dim) if one.needs_place else None
        made, sums = one.body(_ALONG, values[: len(rows)], values[len(rows) :], place)
        for ref, value in zip(outs, made, strict=False):
            ref[...] = value.astype(ref.dtype)
        _add(outs[len(one.outs) :], sums, index < num_rows)

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, tile),),
        in_specs=[*[by_tile] * len(rows), *[whole] * len(shared)],
        out_specs=[*[by_tile] * len(one.outs), *[whole] * one.num_sums],
        out_shape=[
            *[jax.ShapeDtypeStruct((num_rows, dim), dtype) for dtype in one.outs],
            *[jax.ShapeDtypeStruct((1, dim), jnp.float32)] * one.num_sums,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary" if one.num_sums else "parallel",)),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
    )(*rows, *[array.reshape(1, dim) for array in shared])
    return [*out[: len(one.outs)], *[total[0] for total in out[len(one.outs) :]]]


def _place(row: jax.Array, dim: int) -> jax.Array:
    return (row * dim + jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)).astype(jnp.uint32)


def _add(refs: Sequence[Any], sums: Sequence[jax.Array], is_row: jax.Array) -> None:
    """Rows beyond the last are whatever lies there: they are left out of the sums."""

    @pl.when(pl.program_id(0) == 0)
    def start() -> None:
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)

    for ref, value in zip(refs, sums, strict=True):
        ref[...] += jnp.sum(jnp.where(is_row, value, 0.0), axis=0, keepdims=True)
