"""Which leaves are stacks of layers, told from shapes alone: the dim that `scan` will run over must not be sharded."""

import itertools
import re
from collections.abc import Sequence

from jzero._types import Leaf

MAX_LAYERS = 256  # the deepest dense models trained so far have about 130 layers; widths start about here
STACK_NAME = re.compile(r"(layers|blocks|repeats|stack(ed)?)$|scan", re.IGNORECASE)

Member = tuple[int, list[str]]  # index of a leaf, its path


def stacked_dims(leaves: Sequence[Leaf]) -> tuple[int | None, ...]:
    """For each leaf the dim that runs over layers: 0, or None where it has no such dim.

    A stack is the largest subtree of parameters whose leaves all have the same first size L, at least one of them with three
    dims, and either two different shapes or a name that says so (`layers/w`). An attention kernel [model, heads, head_dim] by
    itself is no stack. A leaf that mirrors a parameter follows it.

    Example:
      >>> import numpy as np
      >>> shapes = {"layers/w": (4, 8, 16), "layers/scale": (4, 8), "embed": (32, 8)}
      >>> f32 = np.dtype("float32")
      >>> stacked_dims([Leaf(path, shape, f32, "params", i) for i, (path, shape) in enumerate(shapes.items())])
      (0, 0, None)
    """
    params = [(i, leaf.path.split("/")) for i, leaf in enumerate(leaves) if leaf.role == "params"]
    found = _stacks(leaves, params, 0)
    return tuple(0 if (i if leaf.owner is None else leaf.owner) in found else None for i, leaf in enumerate(leaves))


def _stacks(leaves: Sequence[Leaf], members: list[Member], depth: int) -> set[int]:
    """Indices of the leaves of maximal stacks among `members`, which agree on the first `depth` names of their paths."""
    if not members:
        return set()
    shapes = {leaves[i].shape for i, _ in members}
    if _may_be_stack(shapes) and (len(shapes) > 1 or _is_named_stack(members[0][1][: depth + 1])):
        return {i for i, _ in members}
    children: dict[str, list[Member]] = {}
    for i, parts in members:
        if len(parts) > depth + 1:
            children.setdefault(parts[depth], []).append((i, parts))
    return {i for below in children.values() for i in _stacks(leaves, below, depth + 1)}


def _may_be_stack(shapes: set[tuple[int, ...]]) -> bool:
    sizes = {shape[:1] for shape in shapes}
    return len(sizes) == 1 and () not in sizes and max(map(len, shapes)) >= 3 and 1 < max(max(sizes)) <= MAX_LAYERS


def _is_named_stack(parts: Sequence[str]) -> bool:
    """`layers/w` or `ScanBlock_0/w`, but not `layers/0/w`: a list of layers, each by itself."""
    pairs = itertools.pairwise(parts)
    return any(STACK_NAME.search(name) and not below.isdigit() for name, below in pairs)
