"""Leaves of a state that are not arrays (an equinox activation function, a flag): kept aside, put back unchanged."""

from typing import Any

import jax
import numpy as np


class Statics:
    """The leaves of one pytree that are not arrays, by position. Falsy when there are none; compares by equality."""

    def __init__(self, treedef: Any, leaves: tuple[tuple[int, Any], ...]):
        self.treedef, self.leaves = treedef, leaves

    def __bool__(self) -> bool:
        return bool(self.leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statics) and self.leaves == other.leaves and (not self.leaves or self.treedef == other.treedef)

    def __hash__(self) -> int:
        return hash(tuple(index for index, _ in self.leaves))

    def full(self, array: Any) -> list[Any]:
        """All leaves by position, `array` standing for each that is one."""
        known = dict(self.leaves)
        return [known.get(index, array) for index in range(self.treedef.num_leaves)]

    def merge(self, arrays: Any) -> Any:
        """The pytree again, from the same structure without its static leaves."""
        if not self.leaves:
            return arrays
        known, rest = dict(self.leaves), iter(jax.tree.leaves(arrays))
        full = [known[index] if index in known else next(rest) for index in range(self.treedef.num_leaves)]
        return jax.tree.unflatten(self.treedef, full)

    def strip(self, tree: Any) -> Any:
        """A pytree of the full structure (of bools, say) without what stands where the static leaves do; any other as it is."""
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            return tree
        known = dict(self.leaves)
        return jax.tree.unflatten(treedef, [None if index in known else leaf for index, leaf in enumerate(leaves)])


def split_statics(tree: Any) -> tuple[Any, Statics]:
    """The tree with static leaves taken out (as None), and what was taken."""
    leaves, treedef = jax.tree.flatten(tree)
    static = tuple((index, leaf) for index, leaf in enumerate(leaves) if not is_array_like(leaf))
    if not static:
        return tree, Statics(treedef, ())
    positions = {index for index, _ in static}
    kept = [None if index in positions else leaf for index, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, kept), Statics(treedef, static)


def is_array_like(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex | np.generic)
