"""A program that the TPU compiler refuses because it does not fit is an answer too: how much it would need."""

import re
from typing import Any

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSAL = re.compile(
    r"total memory required for (?P<what>[^()]*) \((?P<number>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM"
)


def figures(message: str, resting_bytes: int) -> dict[str, Any] | None:
    """What a compiled program's figures would be, as far as the compiler's message says it; None for any other failure.

    `resting_bytes`: the state on one device, which the compiler's figure for temporaries leaves out. It stops before
    there is a program, so traffic and roles are not known.
    """
    found = _REFUSAL.search(message)
    if found is None:
        return None
    size = int(float(found["number"]) * _UNITS[found["unit"]])
    temps = "temporaries" in found["what"]
    return {
        "at_rest": {}, "wire": {}, "temp_bytes": size if temps else None, "peak_bytes": size + (resting_bytes if temps else 0),
        "findings": ["The compiler refused the program for its size and gave no more than its total."], "refused": True,
    }  # fmt: skip
