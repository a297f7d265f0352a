"""Which leaves below the found roots are parameters: not counters, keys, statistics or copies."""

from collections.abc import Sequence

from jzero._tree import is_key
from jzero.roles import names
from jzero.roles.entries import Entry, Parts
from jzero.roles.mirror import Owners

Relative = dict[int, set[Parts]]  # index of a parameter -> the paths below its root by which other leaves may mirror it


def members(found: Sequence[Entry], roots: Sequence[Parts]) -> Relative:
    """The parameters below the roots, each with its path below its root."""
    typed = any(entry.kind == "param" for entry in found)
    below: dict[int, Parts] = {}
    for i, entry in enumerate(found):
        root = max((root for root in roots if entry.parts[: len(root)] == root), key=len, default=None)
        if root is not None and (entry.kind == "param" if typed else _is_trainable(entry, root)):
            below[i] = entry.parts[len(root) :]
    left_out = _left_out(found, below)
    return {i: {path} for i, path in below.items() if i not in left_out}


def _is_trainable(entry: Entry, root: Parts) -> bool:
    """Arrays and float scalars (a temperature); no keys, no counters. Where the root is the whole state: weights only."""
    if entry.kind != "unknown" or is_key(entry) or (entry.shape == (2,) and entry.dtype == "uint32"):
        return False
    return entry.is_weight_like or (bool(root) and (bool(entry.shape) or entry.is_float))


def _left_out(found: Sequence[Entry], below: dict[int, Parts]) -> set[int]:
    """Leaves below a root that are named like statistics or copies, and that no optimizer leaf mirrors."""
    paths = set(below.values())
    doubtful = {i for i, path in below.items() if path and (path[0].lower() in names.NOT_PARAMS or _is_copy(path, paths))}
    if not doubtful:
        return set()
    owners = Owners(found, {i: {path} for i, path in below.items()})
    trained = {owners(entry) for entry in found if entry.kind == "opt"}
    return doubtful - trained


def _is_copy(path: Parts, paths: set[Parts]) -> bool:
    return names.is_copy(path[0]) and path[1:] in paths
