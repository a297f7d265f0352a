"""Optimizer leaves mirror parameters: same path below some root, same shape. Both directions of that fact are found here.

`covers` asks where the roots are, from all leaves; `Owners` asks whom one leaf mirrors, once the parameters are known.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from jzero.roles import names
from jzero.roles.entries import Entry, Parts

Covers = dict[Parts, set[int]]  # root of a candidate subtree -> indices of its leaves that something mirrors


def covers(group: Iterable[Entry], rest: Sequence[tuple[int, Entry]], *, same_shape: bool = True) -> Covers:
    """For each possible root of the parameters, the leaves of `rest` below it that leaves of `group` mirror.

    Every cut of a mirroring path votes: `mu/dense/kernel` says that parameters are at R where R/dense/kernel exists, or
    R/kernel. The true root is the one that explains most leaves.
    """
    mirrored = {(suffix, entry.shape if same_shape else None) for entry in group for suffix in _suffixes(entry.parts)}
    found: Covers = defaultdict(set)
    for index, entry in rest:
        for cut, suffix in enumerate(_suffixes(entry.parts)):
            if (suffix, entry.shape if same_shape else None) in mirrored:
                found[entry.parts[:cut]].add(index)
    return dict(found)


def _suffixes(parts: Parts) -> list[Parts]:
    """Longest first; the empty one left out."""
    return [parts[cut:] for cut in range(len(parts))]


def widest(found: Covers, forbidden: Iterable[Parts]) -> list[Parts]:
    """The roots that explain most leaves; no copies, and of nested ones the outermost that holds no optimizer state itself."""
    most = max(map(len, found.values()), default=0)
    best = names.originals([root for root, leaves in found.items() if len(leaves) == most])
    outside = [root for root in best if not any(group[: len(root)] == root for group in forbidden)]
    best = outside or best
    return [root for root in best if not any(other != root and root[: len(other)] == other for other in best)]


def _shared(left: Parts, right: Parts) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Owners:
    """Looks up the parameter that a leaf mirrors. `relative` gives each parameter's possible paths below its root."""

    def __init__(self, found: Sequence[Entry], relative: dict[int, set[Parts]]):
        self._found = found
        self._by_relative: dict[Parts, list[int]] = defaultdict(list)
        for index, paths in relative.items():
            for path in paths:
                self._by_relative[path].append(index)

    def __call__(self, entry: Entry) -> int | None:
        """The parameter whose whole relative path ends `entry`'s path, if its shape is equal. Longest path wins."""
        for cut in range(len(entry.parts) + 1):
            candidates = self._by_relative.get(entry.parts[cut:])
            if candidates:
                nearest = max(candidates, key=lambda index: _shared(self._found[index].parts, entry.parts))
                same = entry.shape == self._found[nearest].shape and entry.is_moment_like
                return nearest if same else None
        return None
