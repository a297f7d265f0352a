"""A state as what lies on disk: nested dicts of arrays under the leaves' names, so that any program can read it back.

`TrainState(params={"w": ...}, opt_state=(ScaleByAdamState(...),))` is written as `{"params": {"w": ...}, "opt_state": {"0":
{"mu": ...}}}`. Containers matter to nobody who reads; names do.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jzero._errors import explain
from jzero._tree import is_key, leaves_with_path, path_parts
from jzero.offload.nvme.array import DiskArray

Name = tuple[str, ...]
WHO = "jzero.checkpoint"
ROOT: Name = ("value",)  # the name of a state that is one array


def names(tree: Any) -> list[Name]:
    """The name of every leaf, in flattening order; two leaves of one name are an error."""
    found = [path_parts(path) or ROOT for path, _ in leaves_with_path(tree)]
    twice = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    if twice:
        fix = "Rename one of each pair: dict keys such as 1 and '1' cannot be told apart on disk."
        raise ValueError(explain(WHO, "several leaves share one name", found=["/".join(name) for name in twice], fix=fix))
    return found


def nest(flat: Mapping[Name, Any]) -> dict[str, Any]:
    """Nested dicts from named leaves."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        node = tree
        for part in name[:-1]:
            node = node.setdefault(part, {})
        node[name[-1]] = leaf
    return tree


def unnest(tree: Any) -> dict[Name, Any]:
    """Named leaves of what Orbax gives back: dicts, and lists where a program other than jzero wrote lists."""
    if isinstance(tree, Mapping):
        pairs = [(str(key), node) for key, node in tree.items()]
    elif isinstance(tree, list | tuple):
        fields = getattr(tree, "_fields", range(len(tree)))
        pairs = [(str(key), node) for key, node in zip(fields, tree, strict=True)]
    else:
        return {(): tree}
    return {(key, *name): leaf for key, node in pairs for name, leaf in unnest(node).items()}


def replace(tree: Any, flat: Mapping[Name, Any], name: Name = ()) -> Any:
    """`tree` with other leaves, by name; what has no new leaf (a None, an empty dict) stays."""
    if isinstance(tree, Mapping):
        return {key: replace(node, flat, (*name, str(key))) for key, node in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace(node, flat, (*name, str(index))) for index, node in enumerate(tree)]
    return flat.get(name, tree)


def to_disk(leaf: Any) -> Any:
    """An array as it is stored: a typed PRNG key as its uint32 words, a Python scalar as an array of jax's dtype for it."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array | DiskArray) else np.asarray(leaf, jax.dtypes.result_type(leaf))


def stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `to_disk(leaf)`, for abstract leaves too."""
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(words.shape, words.dtype)
    return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.dtypes.result_type(leaf))


def key_impl(leaf: Any) -> str | None:
    """`threefry2x32` for a typed key, None for anything else."""
    if not is_key(leaf):
        return None
    seen: list[str] = []
    jax.eval_shape(lambda key: seen.append(str(jax.random.key_impl(key))), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return seen[0]
