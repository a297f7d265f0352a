"""Pytrees as lists of named leaves: paths as users write them, shapes and bytes without allocating anything."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: Sequence[Any]) -> str:
    """A key path as `layers/attn/w1`, the form that `rules=` patterns are matched against."""
    return "/".join(path_parts(path))


def path_parts(path: Sequence[Any]) -> tuple[str, ...]:
    """A key path as names: `('layers', '0', 'w1')` whether the containers are dicts, lists, dataclasses or modules."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


@functools.cache
def _is_box_type(kind: type) -> bool:
    """Flax wraps arrays in one-field boxes (nnx.Variable, linen's Partitioned): recognised by name, so flax stays optional."""
    return any(base.__module__.startswith("flax.") and base.__name__ in ("Variable", "AxisMetadata") for base in kind.__mro__)


def is_box(node: Any) -> bool:
    """Whether `node` is a flax box around a value; its own key, `value`, is no part of the leaf's name."""
    return _is_box_type(type(node))


def leaves_with_path(tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> list[tuple[tuple[Any, ...], Any]]:
    """`jax.tree_util.tree_leaves_with_path` without the `value` keys that flax boxes add."""
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or is_box(node)):
        if is_box(node) and not is_leaf(node):
            found += [(path + inner[1:], leaf) for inner, leaf in jax.tree_util.tree_leaves_with_path(node)]
        else:
            found.append((path, node))
    return found


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for every leaf, in flattening order."""
    return [(path_name(path), leaf) for path, leaf in leaves_with_path(tree)]


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is a typed PRNG key array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_float(leaf: Any) -> bool:
    """Whether `leaf` can be differentiated: a floating-point array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def abstract(tree: Any) -> Any:
    """The tree with every array replaced by its `ShapeDtypeStruct` (shardings and weak types dropped)."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)), tree)


def num_elements(leaf: Any) -> int:
    return math.prod(leaf.shape)


def num_bytes(leaf: Any) -> int:
    """Bytes of one whole leaf. A typed PRNG key counts as its underlying uint32 words."""
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        return num_elements(leaf) * math.prod(words.shape) * words.dtype.itemsize
    return num_elements(leaf) * jnp.dtype(leaf.dtype).itemsize


def short(leaf: Any) -> str:
    """`float32[50257,768]`, as error messages and tables print a leaf."""
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
