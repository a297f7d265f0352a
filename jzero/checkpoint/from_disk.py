"""Leaves that rest on NVMe, straight from their files into a checkpoint: a few at a time, so that memory stays bounded.

Orbax writes arrays that are in memory. Its handler for them is given one portion after the other here, each of which lies in host
memory only while it is written. What comes out is the same as for a state on devices. A save waits for these leaves: the next
but one step would write over them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jzero.offload.nvme.array import DiskArray

PORTION_BYTES = 2**28


class DiskArrayHandler(type_handlers.ArrayHandler):
    """Orbax's handler of arrays, for leaves that have to be read first."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for portion in _portions(values):
            arrays = [jax.device_put(values[index].read(), _host(values[index].sharding)) for index in portion]
            chosen = [[every[index] for index in portion] for every in (infos, args)]
            for future in await super().serialize(arrays, *chosen):
                future.result()
            for array in arrays:
                array.delete()
        return []


def registry() -> Any:
    """Orbax's handlers by type, with one for leaves on disk."""
    known = [(kind, type_handlers.get_type_handler(kind)) for kind in (int, float, bytes, str)]
    return type_handlers
