"""Which parameters train, and the optimizer's view of them: frozen leaves leave no trace in its state."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jzero._errors import explain
from jzero._tree import is_float, named_leaves
from jzero.precision import PrecisionPolicy


def trainable_mask(params: Any, trainable: Any) -> tuple[bool, ...]:
    """Per flat leaf: whether it trains. Integer, boolean and key leaves never do.

    Args:
      trainable: None for all, a pytree of bools like `params`, or a function of a leaf's path.
    """
    named = named_leaves(params)
    floats = [is_float(leaf) for _, leaf in named]
    if trainable is None:
        asked = [True] * len(named)
    elif (callable(trainable) and not jax.tree_util.all_leaves([trainable])) or callable(trainable):
        asked = [bool(trainable(path)) for path, _ in named]
    else:
        asked = _from_tree(params, trainable)
    mask = tuple(wanted and is_real for wanted, is_real in zip(asked, floats, strict=True))
    if not any(mask):
        found = [f"{len(named)} leaves, {sum(floats)} of them floating point"]
        fix = "trainable= is a bool pytree like params, or path -> bool with paths like 'layers/attn/w1'."
        raise ValueError(explain("jzero.make_train_step", "no parameter is trainable", found=found, fix=fix))
    return mask


def as_array(leaf: Any) -> Any:
    """A Python number as an array, so that it counts as what it is once the step is traced; anything else as it is."""
    return jnp.array(leaf) if isinstance(leaf, int | float | complex) else leaf


def _from_tree(params: Any, trainable: Any) -> list[bool]:
    if jax.tree.structure(trainable) != jax.tree.structure(params):
        found = [f"params:    {jax.tree.structure(params)}", f"trainable: {jax.tree.structure(trainable)}"]
        raise ValueError(
            explain("jzero.make_train_step", "trainable= is not a pytree like params", found=found, fix="Or pass path -> bool.")
        )
    return [bool(leaf) for leaf in jax.tree.leaves(trainable)]


def select(leaves: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """The leaves that train."""
    return [leaf for leaf, kept in zip(leaves, mask, strict=True) if kept]


def merge(chosen: Sequence[Any], leaves: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """All leaves, those that train replaced by `chosen`."""
    fresh = iter(chosen)
    return [next(fresh) if kept else leaf for leaf, kept in zip(leaves, mask, strict=True)]


def for_optimizer(treedef: Any, leaves: Sequence[Any], mask: Sequence[bool]) -> Any:
    """A tree for optax in which frozen leaves are empty nodes, what is no array is None, and the rest is float32 or wider."""

    def seen(leaf: Any, kept: bool) -> Any:
        if kept:
            return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return optax.MaskedNode() if hasattr(leaf, "dtype") else None

    return jax.tree.unflatten(treedef, [seen(leaf, kept) for leaf, kept in zip(leaves, mask, strict=True)])


def store_moments(opt_state: Any, policy: PrecisionPolicy, convert: Callable[[jax.Array, Any], jax.Array] | None = None) -> Any:
    """The optimizer's arrays in `policy.moments` where that is narrower; scalars (rates, counts) stay."""
    convert = convert or (lambda leaf, dtype: leaf.astype(dtype))

    def store(leaf: Any) -> Any:
        narrower = is_float(leaf) and leaf.ndim > 0 and jnp.dtype(policy.moments).itemsize < leaf.dtype.itemsize
        return convert(leaf, policy.moments) if narrower else leaf

    return jax.tree.map(store, opt_state)
