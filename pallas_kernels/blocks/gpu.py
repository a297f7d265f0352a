"""Blocks on a GPU (Mosaic GPU): a warp holds a block in registers, four of them a program, reductions by shuffles."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import BlockPass, Values
from pallas_kernels.rows import Along
from pallas_kernels.rows.gpu import mosaic

_WARPS, _LANES = 4, 32
_VECTOR = 8  # elements that a thread loads at once: 16 bytes of bfloat16, two loads of 16 of float32


def layout_of(width: int) -> Any:
    """[4, width] with a row to a warp."""
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    vector = min(_VECTOR, width // _LANES)
    while width % (_LANES * vector):
        vector //= 2
    return mosaic().Layout.TILED(Tiling(((_WARPS, _LANES * vector), (vector,))), (-3,), (-2,), -1)


def run(
    one: BlockPass, arrays: Sequence[jax.Array], scales: Sequence[jax.Array] = (), numbers: jax.Array | None = None,
    seeds: jax.Array | None = None, *, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Outputs [M, P width], then scales float32[M, P], from arrays [M, P k piece], scales [M, P], float32[n] and uint32[m]."""
    plgpu, piece, layout = mosaic(), one.piece, layout_of(one.piece)
    num_rows = arrays[0].shape[0]
    num_parts = _num_parts(one, arrays, scales)
    num_blocks = num_rows * num_parts
    more = max(_WARPS - num_blocks, 0)  # fewer blocks than warps: filled up, and cut off again
    blocked: list[Any] = [_filled(array.reshape(num_blocks, -1), more) for array in arrays]
    scaled = [_filled(array.reshape(num_blocks), more) for array in scales]
    total, given = num_blocks + more, [array for array in (numbers, seeds) if array is not None]
    # In place no block may be done twice.
    places = {out: array for array, out in one.in_place} if total % _WARPS == 0 else {}
    for array in places.values():
        blocked[array] = jax.new_ref(blocked[array])
    shape = (_WARPS, piece)
    along = Along(
        lambda x: jnp.sum(x, axis=1), lambda x: jnp.max(x, axis=1), lambda s: jax.lax.broadcast_in_dim(s, shape, (0,))
    )

    def kernel(*refs: Any) -> None:
        array_refs, refs = refs[: len(blocked)], refs[len(blocked) :]
        scale_refs, refs = refs[: len(scaled)], refs[len(scaled) :]
        given_refs, refs = refs[: len(given)], refs[len(given) :]
        # The last program's blocks may lie beyond the end: it then takes the last four, some of them a second time.
        first = jnp.minimum(jax.lax.axis_index("programs") * _WARPS, total - _WARPS)
        rows = pl.ds(first, _WARPS)

        def load(ref: Any) -> list[Any]:
            return [
                plgpu.load(ref.at[rows, pl.ds(start, piece)], layout=layout, optimized=False)
                for start in range(0, ref.shape[1], piece)
            ]

        scalars = [[ref[i] for i in range(ref.shape[0])] for ref in given_refs]
        found_numbers = scalars[0] if numbers is not None else []
        found_seeds = scalars[-1] if seeds is not None else []
        values = Values(
            along,
            [load(ref) for ref in array_refs],
            [plgpu.load(ref.at[rows], layout=layout.reduce(1), optimized=False) for ref in scale_refs],
            found_numbers,
            found_seeds,
            [_place(first, one.block, start, shape, layout) for start in range(0, one.block, piece)]
            if one.needs_places
            else [],
        )
        outs, made = one.body(values)
        left = iter(refs)
        for number, pieces in enumerate(outs):
            ref = array_refs[places[number]] if number in places else next(left)
            for index, value in enumerate(pieces):
                _store(ref.at[rows, pl.ds(index * piece, piece)], value.astype(ref.dtype))
        for ref, value in zip(left, made, strict=True):
            _store(ref.at[rows], value)

    out = plgpu.kernel(
        kernel,
        out_type=[
            *[jax.ShapeDtypeStruct((total, each.width), each.dtype) for i, each in enumerate(one.outs) if i not in places],
            *[jax.ShapeDtypeStruct((total,), jnp.float32)] * one.num_scales,
        ],
        grid=(pl.cdiv(total, _WARPS),),
        grid_names=("programs",),
        interpret=plgpu.InterpretGPUParams(uninitialized_memory="nan") if interpret else None,
    )(*blocked, *scaled, *given)
    fresh = iter(out)
    found = [jax.freeze(blocked[places[i]]) if i in places else next(fresh) for i in range(len(one.outs))]
    return [array[:num_blocks].reshape(num_rows, -1) for array in (*found, *fresh)]


def _store(ref: Any, value: jax.Array) -> None:
    """jax 0.12 refuses stores of less than whole sectors (narrow codes) unless it is told; 0.11 has no word for it."""
    plgpu = mosaic()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _num_parts(one: BlockPass, arrays: Sequence[jax.Array], scales: Sequence[jax.Array]) -> int:
    return scales[0].shape[1] if scales else arrays[0].shape[1] // one.block


def _filled(array: jax.Array, more: int) -> jax.Array:
    return jnp.pad(array, [(0, more), *[(0, 0)] * (array.ndim - 1)]) if more else array


def _place(first: Any, block: int, start: int, shape: tuple[int, int], layout: Any) -> jax.Array:
    iota = lambda dim: mosaic().broadcasted_iota(jnp.int32, shape, dim, layout=layout)
    return ((first + iota(0)) * block + start + iota(1)).astype(jnp.uint32)
