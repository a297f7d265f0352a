"""One pass over the rows of some arrays, as a TPU or a GPU kernel: what norms, quantizers and gates have in common.

A body is plain jnp on float32 values of some rows; it is told how to add along a row (`total`), since a TPU works on tiles
[R, D] and a GPU on one row [D] at a time. The same body is what both kernels run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Total = Callable[[jax.Array], jax.Array]  # sums (or largest values) along a row, in a shape that broadcasts against rows


class Along(NamedTuple):
    """How to reduce along a row."""

    total: Total
    largest: Total
    spread: Total = lambda value: value  # what `total` and `largest` give, against which rows broadcast


class Pass(NamedTuple):
    """`body(along, rows, shared, place) -> (outs, sums)`.

    rows: the values of each row array; shared: of each [D] array; place: flat index of every element, uint32.
    outs: one value per entry of `outs` below; sums: `num_sums` values that are added up over all rows into float32[D].
    """

    body: Callable[[Along, Sequence[Any], Sequence[Any], Any], tuple[Sequence[Any], Sequence[Any]]]
    outs: Sequence[jnp.dtype]  # dtype of each output [N, D]
    num_sums: int = 0
    needs_place: bool = False


def why_not(dim: int, arrays: Sequence[Any], most: int = 16384) -> str | None:
    """Why the kernels cannot take rows of this length, or None."""
    if dim % 128 or dim > most:
        return f"rows must be a multiple of 128 up to {most} long, these are {dim}"
    wrong = sorted({str(array.dtype) for array in arrays} - {"float32", "bfloat16", "float16"})
    return f"float32, bfloat16 and float16 only, not {', '.join(wrong)}" if wrong else None
