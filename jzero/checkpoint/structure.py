"""The containers of a state as JSON, so that a fresh process can rebuild it without the code that made it.

Dicts, lists, tuples, None and named tuples (optax's states, jzero's TrainState). A named tuple is looked up among the modules
that are already imported, and must have the stored fields: nothing on disk can make this process import or run anything.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax

LEAF = "*"


def describe(treedef: Any) -> Any:
    """The structure as JSON, or None if it has a container that is not one of the above."""
    try:
        return _describe(treedef)
    except TypeError:
        return None


def _describe(treedef: Any) -> Any:
    if jax.tree_util.treedef_is_leaf(treedef) and treedef.num_leaves == 1:
        return LEAF
    kind, data = treedef.node_data()
    children = [_describe(child) for child in treedef.children()]
    if kind is type(None):
        return None
    if kind is dict and all(isinstance(key, str | int) for key in data):
        return {"dict": [[key, child] for key, child in zip(data, children, strict=True)]}
    if kind in (list, tuple):
        return {kind.__name__: children}
    if issubclass(kind, tuple) and hasattr(kind, "_fields") and "<" not in kind.__qualname__:
        return {"named": f"{kind.__module__}:{kind.__qualname__}", "fields": list(kind._fields), "values": children}
    raise TypeError(kind)


def rebuild(described: Any, leaves: Iterator[Any]) -> Any:
    """The pytree again, its leaves taken in order.

    Raises:
      LookupError: a named tuple whose module is not imported, or that has other fields now.
    """
    if described == LEAF:
        return next(leaves)
    if described is None:
        return None
    if "dict" in described:
        return {key: rebuild(child, leaves) for key, child in described["dict"]}
    if "named" in described:
        kind = _find(described["named"], described["fields"])
        return kind(*[rebuild(child, leaves) for child in described["values"]])
    ((kind, children),) = described.items()
    values = [rebuild(child, leaves) for child in children]
    return tuple(values) if kind == "tuple" else values


def _find(where: str, fields: list[str]) -> Any:
    module, _, name = where.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_named = isinstance(found, type) and issubclass(found, tuple)
    if not is_named or list(getattr(found, "_fields", ())) != fields:
        raise LookupError(f"{where} with the fields {', '.join(fields)}")
    return found
