"""Leaves that rest on NVMe, straight from their files into a checkpoint: a few at a time, so that memory stays bounded.

Orbax writes arrays that are in memory. Its handler of arrays is given one portion after the other here, each of which lies in
host memory only while it is written. What comes out is the same as for a state on devices. A save waits for these leaves: the
next step but one writes over them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jzero.offload.nvme.array import DiskArray

PORTION_BYTES = 2**28  # in this process; a larger leaf is a portion by itself


class Handler(type_handlers.ArrayHandler):
    """Orbax's handler of arrays, and of leaves that have to be read first."""

    def __init__(self) -> None:
        known: Any = type_handlers.get_type_handler(jax.Array)
        super().__init__(array_metadata_store=known._array_metadata_store)

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Leaves on disk at once, portion by portion; the others in the background, as Orbax does."""
        args, futures = args or [ocp.SaveArgs()] * len(values), []
        pick = lambda numbers, *rows: [[row[index] for index in numbers] for row in rows]
        for portion in _portions(values):
            arrays = [_in_host_memory(values[index]) for index in portion]
            for future in await super().serialize(arrays, *pick(portion, infos, args)):
                future.result()
            for array in arrays:
                array.delete()
        rest = [index for index, value in enumerate(values) if not isinstance(value, DiskArray)]
        if rest:
            futures += await super().serialize(*pick(rest, values, infos, args))
        return futures


def _portions(values: Sequence[Any]) -> Iterator[list[int]]:
    portion, size = [], 0
    for index, value in enumerate(values):
        if isinstance(value, DiskArray):
            if portion and size + value.nbytes > PORTION_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(index)
            size += value.nbytes
    if portion:
        yield portion


def _in_host_memory(leaf: DiskArray) -> jax.Array:
    """A leaf as an array that takes no device memory where the back end can keep it elsewhere."""
    return leaf.read(memory_kind="pinned_host")


def registry() -> Any:
    """Orbax's handlers by type, with this one for arrays."""
    known = [(kind, type_handlers.get_type_handler(kind)) for kind in (int, float, bytes, str)]
    handler = Handler()
    found = type_handlers.create_type_handler_registry(*known, (jax.Array, handler))
    found.add(DiskArray, handler, override=True, ignore_warnings=True)
    return found
