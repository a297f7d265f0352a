"""Where and how large the arrays of a printed shape lie in memory: tiles pad them, memory spaces keep them out of HBM."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jzero.hlo.text import bits

# `bf16[4,128,512]{2,1,0:T(8,128)(2,1)S(1)}`: dims, minor to major, tiles (the first one pads), memory space.
_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
HBM, HOST = 0, 5  # xla/service/hlo.proto and jax's memory kinds: 5 is host memory; 1 is a TPU core's vector memory


class Stored(NamedTuple):
    """One array as it is stored."""

    bytes: int  # with the padding of its tiles
    space: int


def stored(type_text: str) -> Iterator[Stored]:
    """The arrays of a printed shape, left to right.

    Example:
      >>> list(stored("(f32[3,130]{1,0:T(8,128)}, bf16[8]{0:S(1)})"))
      [Stored(bytes=8192, space=0), Stored(bytes=16, space=1)]
    """
    for dtype, dims, order, layout in _LEAF.findall(type_text):
        sizes = [int(size.strip(" <=")) for size in dims.split(",") if size.strip()]
        if order:  # minor to major
            sizes = [sizes[int(dim)] for dim in reversed(order.split(","))]
        tile, space = _TILE.search(layout), _SPACE.search(layout)
        elements = _padded(sizes, [int(size) for size in tile[1].split(",")]) if tile else math.prod(sizes)
        yield Stored(elements * bits(dtype) // 8, int(space[1]) if space else HBM)


def _padded(sizes: list[int], tile: list[int]) -> int:
    """Elements once the minor dims are rounded up to whole tiles."""
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    outer, inner = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
    return math.prod(outer) * math.prod(-(-size // part) * part for size, part in zip(inner, tile, strict=True))
