"""Rows on a GPU (Mosaic GPU): a warpgroup of 128 threads holds a row in registers; sums are kept there over many rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.rows import Along, Pass

_THREADS = 128
_PROGRAMS = 132 * 4  # where sums are kept: a few per multiprocessor of an H100, each with a row of float32 to write
_ALONG = Along(jnp.sum, jnp.max)


def mosaic() -> Any:
    """Imported when a kernel is made: importing it sets environment variables."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def layout_of(dim: int, dtypes: Sequence[Any]) -> Any:
    """Every array of a row lies over the threads alike: vectors of up to 16 bytes of the widest dtype."""
    vector = 16 // max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    while dim % (_THREADS * vector):
        vector //= 2
    return mosaic().Layout.WG_STRIDED((dim,), vec_size=vector)


def run(one: Pass, rows: Sequence[jax.Array], shared: Sequence[jax.Array] = (), *, interpret: bool = False) -> list[jax.Array]:
    """Outputs [N, D], then sums float32[D]."""
    plgpu = mosaic()
    num_rows, dim = rows[0].shape
    programs = min(num_rows, _PROGRAMS) if one.num_sums else num_rows
    each = pl.cdiv(num_rows, programs)
    layout = layout_of(dim, [*[array.dtype for array in (*rows, *shared)], *one.outs, jnp.float32])

    def kernel(*refs: Any) -> None:
        num_in = len(rows) + len(shared)
        row_refs, shared_refs, outs = refs[: len(rows)], refs[len(rows) : num_in], refs[num_in:]
        load = lambda ref: plgpu.load(ref, layout=layout, optimized=False)
        program, held = jax.lax.axis_index("programs"), [load(ref) for ref in shared_refs]

        def step(index: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            row = jnp.minimum(program * each + index, num_rows - 1)
            place = _place(row, dim, layout) if one.needs_place else None
            made, more = one.body(_ALONG, [load(ref.at[row]) for ref in row_refs], held, place)
            for ref, value in zip(outs, made, strict=False):
                ref[row] = value.astype(ref.dtype)
            # A program's last rows may lie beyond the end: the last row is then done again, and not added again.
            counts = jnp.where(program * each + index < num_rows, 1.0, 0.0)
            return tuple(total + value * counts for total, value in zip(sums, more, strict=True))

        zeros = tuple(plgpu.layout_cast(jnp.zeros((dim,), jnp.float32), layout) for _ in range(one.num_sums))
        sums = jax.lax.fori_loop(0, each, step, zeros) if each > 1 else step(0, zeros)
        for ref, value in zip(outs[len(one.outs) :], sums, strict=True):
            ref[program] = value

    out = plgpu.kernel(
        kernel,
        out_type=[
            *[jax.ShapeDtypeStruct((num_rows, dim), dtype) for dtype in one.outs],
            *[jax.ShapeDtypeStruct((programs, dim), jnp.float32)] * one.num_sums,
        ],
        grid=(programs,),
        grid_names=("programs",),
        interpret=plgpu.InterpretGPUParams(uninitialized_memory="nan") if interpret else None,
    )(*rows, *shared)
    return [*out[: len(one.outs)], *[jnp.sum(partial, axis=0) for partial in out[len(one.outs) :]]]


def _place(row: Any, dim: int, layout: Any) -> jax.Array:
    column = mosaic().broadcasted_iota(jnp.int32, (dim,), 0, layout=layout)
    return (row * dim + column).astype(jnp.uint32)
