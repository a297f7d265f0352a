"""Tensor-parallel placement of our models: which dim of each weight the `tensor` axis splits.

Megatron's split (Shoeybi et al.: Megatron-LM, 2019): the first product of a block by columns, the second by rows, so that a
block needs one all-reduce forward and one backward; embedding and head by vocabulary. Biases of split columns go along.
"""

import re
from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec

AXIS = "tensor"
COLUMNS, ROWS = 1, 2  # the dim that is split, counted from the end: kernels are [in, out], tables [vocabulary, dim]
Rule = Callable[[str, Any], PartitionSpec | None]


def split(dim_from_the_end: int, pattern: str, axis: str = AXIS) -> Rule:
    """Split that dim of every leaf whose path the pattern finds, in stacked layers as in single ones."""
    return placed(pattern, {dim_from_the_end: axis})


def placed(pattern: str, axes: dict[int, str]) -> Rule:
    """Split several dims, counted from the end, each over its axis."""
    found = re.compile(pattern)

    def rule(path: str, leaf: Any) -> PartitionSpec | None:
        if not found.search(path):
            return None
        return PartitionSpec(*(axes.get(dim) for dim in range(len(leaf.shape), 0, -1)))

    rule.__name__ = f"{'+'.join(axes.values())}({pattern})"
    return rule
