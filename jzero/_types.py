"""Names that several rooms share."""

from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec

Role = Literal["params", "opt_state", "batch", "other"]
ROLES: tuple[Role, ...] = ("params", "opt_state", "batch", "other")

MESH_AXES = ("replica", "data", "pipe", "sequence", "tensor", "expert")  # outermost first
BATCH_AXES = ("replica", "data", "expert")  # the axes that examples are split over
# ZeRO shards over these together; a leaf with `expert` on a dim of its own (experts) over `data` alone.
ZERO_BATCH_AXES = ("data", "expert")
ALSO_AXES = ("sequence",)  # that split each example: ZeRO shards over them too, or they would repeat the state
ZERO_AXES = (*ZERO_BATCH_AXES, *ALSO_AXES)
SHOWN_AXES = (*ALSO_AXES, "expert")  # that code inside a step has to know of


class Leaf(NamedTuple):
    """One leaf of a step's state, in flattening order, and what it is."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    role: Role
    owner: int | None  # index of the parameter leaf that this leaf mirrors; a parameter owns itself


class Placement(NamedTuple):
    """Where one leaf lives, and the reason, as the report prints it."""

    leaf: Leaf
    spec: PartitionSpec
    why: str
