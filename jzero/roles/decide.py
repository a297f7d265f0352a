"""Roles and owners of a state's leaves, from its structure alone."""

from collections.abc import Callable, Sequence
from typing import Any

from jzero._types import Leaf, Role
from jzero.roles import names
from jzero.roles.entries import Entry, entries
from jzero.roles.find import find
from jzero.roles.members import Relative, members
from jzero.roles.mirror import Owners
from jzero.roles.said import chosen


def assign(state: Any, *, params: Callable[[Any], Any] | None = None) -> tuple[Leaf, ...]:
    """Which leaves of `state` are parameters, optimizer state or something else, in flattening order.

    Signs in the order of trust: `params=`; keys `params` beside `opt_state`; optax's and nnx's types; optimizer leaves that
    mirror a subtree's paths and shapes; well-known names. Nothing is allocated and nothing is computed.

    Args:
      state: a pytree of arrays or `ShapeDtypeStruct`s: tuples, dicts, flax TrainState, nnx State, equinox modules.
      params: `state -> the subtree that is the parameters`, where that cannot be found.

    Returns:
      One `Leaf` per leaf. `owner` is the index of the parameter that a leaf mirrors (same path below its root, same shape);
      a parameter owns itself; a leaf of another shape (Adafactor's factors, counters) has none. A copy of the parameters, like
      an EMA that the user keeps, has role `other` and an owner.

    Raises:
      TypeError: leaves that are no arrays (functions, strings).
      ValueError: the parameters cannot be told; the message prints the tree and the line to write.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((4, 2))}
      >>> [(leaf.path, leaf.role, leaf.owner) for leaf in assign({"w": params, "m": params, "step": 0})]
      [('m/w', 'opt_state', 2), ('step', 'other', None), ('w/w', 'params', 2)]
    """
    found = entries(state)
    if params is not None:
        picked = chosen(state, params, found)
        return _leaves(found, {i: {path, found[i].parts} for i, path in picked.items()})
    found, roots = find(found, state)
    return _leaves(found, members(found, roots))


def _leaves(found: Sequence[Entry], relative: Relative) -> tuple[Leaf, ...]:
    owners = Owners(found, relative)
    owner = [i if i in relative else owners(entry) for i, entry in enumerate(found)]
    known = any(entry.kind == "opt" for i, entry in enumerate(found) if i not in relative)

    def role(i: int, entry: Entry) -> Role:
        if i in relative:
            return "params"
        return "opt_state" if entry.kind == "opt" or (owner[i] is not None and _is_moment(entry, known=known)) else "other"

    return tuple(
        Leaf("/".join(entry.parts), entry.shape, entry.dtype, role(i, entry), owner[i]) for i, entry in enumerate(found)
    )


def _is_moment(entry: Entry, *, known: bool) -> bool:
    """Of a leaf that mirrors a parameter outside known optimizer state: its name says so, or no optimizer is known."""
    return any(map(names.is_opt, entry.parts)) or not (known or any(map(names.is_copy, entry.parts)))
