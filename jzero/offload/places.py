"""Which leaves of a state rest off the device, decided from shapes."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding

from jzero._errors import explain
from jzero._tree import num_bytes
from jzero._types import Leaf
from jzero.offload.asked import WHO, Offload, Place

SMALL = 1024  # elements, as `min_shard_elements`


def places(offload: Offload | None, leaves: Sequence[Leaf], shardings: Sequence[NamedSharding]) -> tuple[Place | None, ...]:
    """For each leaf where it rests, None being the device. Only what `can_go` does.

    With `fraction` below 1 the leaves whose moving costs most time per byte stay, which are the smallest (a copy has a latency
    of its own), as long as what stays is no more than `1 - fraction` of the bytes.

    Raises:
      ValueError: a role that was to go has no arrays.
    """
    if offload is None:
        return (None,) * len(leaves)
    asked = [offload.place_of(leaf.role) if can_go(leaf) else None for leaf in leaves]
    for role in ("opt_state", "params"):
        if offload.place_of(role) is not None and not any(leaf.role == role and can_go(leaf) for leaf in leaves):
            found = [f"{role}={getattr(offload, role)!r}, and the state has no arrays of this role"]
            fix = f"Leave {role}= out."
            raise ValueError(explain(WHO, f"{role}= would have no effect", found=found, fix=fix))
    sizes = [bytes_on_one_device(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    for index in staying({index: sizes[index] for index, place in enumerate(asked) if place}, offload.fraction):
        asked[index] = None
    return tuple(asked)


def staying(sizes: Mapping[int, int], fraction: float) -> list[int]:
    """Which of the leaves that could go stay after all, by their numbers and bytes on one device."""
    room, found = (1 - fraction) * sum(sizes.values()), []
    for index in sorted(sizes, key=lambda index: (sizes[index], index)):
        room -= sizes[index]
        if room < 0:
            break
        found.append(index)
    return found


def can_go(leaf: Leaf) -> bool:
    """Parameters and the optimizer's arrays. Scalars stay, and small arrays that mirror no parameter: all leaves may share them
    (Muon's coefficients), so the gradient program keeps them.
    """
    if leaf.role == "params":
        return bool(leaf.shape)
    return leaf.role == "opt_state" and bool(leaf.shape) and (leaf.owner is not None or math.prod(leaf.shape) >= SMALL)


def bytes_on_one_device(leaf: Leaf, sharding: NamedSharding) -> int:
    """Of a leaf's shard."""
    return num_bytes(jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype))
