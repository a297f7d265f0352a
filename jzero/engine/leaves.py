"""Arguments of a step, leaf by leaf: what makes them alike, what fixes their dtype, how they are copied onto a mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from jzero.offload.nvme.array import DiskArray


def signature(tree: Any) -> tuple[Any, ...]:
    """Structure, shapes and dtypes, as a key."""
    leaves, treedef = jax.tree.flatten(tree)
    return (treedef, *[(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else ((), type(leaf)) for leaf in leaves])


def is_strong(leaf: Any) -> bool:
    """Whether a leaf is an array whose dtype is fixed."""
    return hasattr(leaf, "dtype") and not getattr(leaf, "weak_type", False)


def strong(leaf: Any) -> Any:
    """A leaf whose dtype is fixed: a weak one would compile the next call anew."""
    leaf = jnp.asarray(leaf)  # a Python scalar's array is weak
    return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def copy(leaf: Any, sharding: Any) -> jax.Array:
    """A leaf on the mesh that shares no buffer with the caller's.

    `may_alias=False` from one device to a replicated sharding keeps the caller's buffer as one piece (jax 0.11.2).
    """
    if isinstance(leaf, DiskArray):
        return jax.device_put(leaf.read(), sharding)
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1:
        leaf = jax.device_put(leaf, leaf.sharding, may_alias=False) if sharding.is_fully_replicated else leaf
    return jax.device_put(leaf, sharding, may_alias=False)


def is_static(arg: Any) -> bool:
    """Callables and Python scalars; an equinox module can be called too, but has arrays in it."""
    if arg is None or isinstance(arg, bool | int | float | complex | str):
        return True
    leaves = jax.tree.leaves(arg)
    return callable(arg) and not any(hasattr(leaf, "dtype") for leaf in leaves)
