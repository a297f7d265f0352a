"""A program that the TPU compiler refuses because it does not fit is an answer too: how much it would need, and of what."""

import re
from typing import Any

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def figures(message: str) -> dict[str, Any] | None:
    """What `worker.measure` would give, as far as the compiler's message says it; None for any other failure.

    The compiler stops here, so there is no traffic and no split into roles.
    """
    used = re.search(rf"Ran out of memory in memory space hbm\. Used {_SIZE}B? of {_SIZE}B? hbm", message)
    if used is None:
        return None
    return {
        "at_rest": {}, "wire": {}, "temp_bytes": None, "peak_bytes": _bytes(used[1], used[2]), "findings": [],
        "largest": largest(message), "refused": True,
    }  # fmt: skip


def largest(message: str) -> list[dict[str, Any]]:
    """The largest allocations that the message lists: bytes, shape, and the operation that made each."""
    found = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(_SIZE, block)
        shape, name = re.search(r"Shape: (\S+?)(?:\{|\s|$)", block), re.search(r'op_name="([^"]*)"', block)
        if size:
            made_by = name[1].rsplit("/", 1)[-1] if name else ""
            found.append({"bytes": _bytes(size[1], size[2]), "shape": shape[1] if shape else "", "made_by": made_by})
    return found


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
