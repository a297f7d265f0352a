"""Batches: split into microbatches and joined again, and padded to a size that divides."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jzero._errors import explain
from jzero._tree import named_leaves
from jzero.rules.batch import is_split


def split(batch: Any, num: int) -> tuple[Any, Any]:
    """Microbatch i holds rows i, i + num, ...: the same examples on one device and on many, with no all-to-all.

    Returns batched leaves as `[num, rows / num, ...]`, None elsewhere, and the other way round the leaves for all.
    """
    each = jax.tree.map(lambda leaf: _rows(leaf, num) if is_split(leaf) else None, batch)
    return each, jax.tree.map(lambda leaf: None if is_split(leaf) else leaf, batch)


def _rows(leaf: jax.Array, num: int) -> jax.Array:
    return jnp.swapaxes(leaf.reshape(leaf.shape[0] // num, num, *leaf.shape[1:]), 0, 1)


def merge(each: Any, shared: Any) -> Any:
    """One microbatch, from its slice of the batched leaves and the leaves for all."""
    return jax.tree.map(lambda a, b: b if a is None else a, each, shared, is_leaf=lambda leaf: leaf is None)


def join(stacked: jax.Array) -> jax.Array:
    """The inverse of `split` for one leaf: `[num, rows / num, ...]` to `[rows, ...]`."""
    return jnp.swapaxes(stacked, 0, 1).reshape(-1, *stacked.shape[2:])


def check(batch: Any, accumulate: int, *, who: str = "jzero.make_train_step") -> None:
    """Every batched leaf has the same number of rows, and the microbatches divide it."""
    rows = {name: leaf.shape[0] for name, leaf in named_leaves(batch) if hasattr(leaf, "ndim") and is_split(leaf)}
    wrong = [f"{name}   {count} rows" for name, count in rows.items() if count % accumulate or count == 0]
    if wrong:
        size = next(count for count in rows.values() if count % accumulate or count == 0)
        near = sorted({size // accumulate * accumulate, -(-size // accumulate) * accumulate} - {0}) or [accumulate]
        fix = f"Nearest legal sizes: {', '.join(map(str, near))}; or batch, mask = jzero.pad_batch(batch, {accumulate})."
        raise ValueError(
            explain(who, f"the batch does not divide into accumulate={accumulate} microbatches", found=wrong, fix=fix)
        )
    if len(set(rows.values())) > 1:
        found = [f"{name}   {count} rows" for name, count in rows.items()]
        raise ValueError(
            explain(
                who,
                "batch leaves disagree on the number of examples",
                found=found,
                fix="Dim 0 of every batch array counts examples.",
            )
        )


def pad_batch(batch: Any, multiple: int) -> tuple[Any, np.ndarray | jax.Array]:
    """The batch with rows repeated at its end until `multiple` divides them, and the mask of the real ones.

    Args:
      batch: pytree of arrays `[rows, ...]`, all with the same number of rows. Scalars and PRNG keys pass unchanged.
      multiple: devices on the batch axes times accumulate.

    Returns:
      The padded batch, and `mask` float32[rows padded], 1 for rows of the batch and 0 for padding: a loss that
      multiplies by it and returns `weighted(sum, weight)` is exactly the loss of the batch alone.

    Raises:
      ValueError: leaves disagree on the number of rows, there are none, or `multiple` is not positive.
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(
            explain(
                "jzero.pad_batch",
                "multiple must be a positive integer",
                found=[f"multiple={multiple!r}"],
                fix="Devices times accumulate.",
            )
        )
    leaves = [leaf if hasattr(leaf, "ndim") else np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {leaf.shape[0] for leaf in leaves if is_split(leaf)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            explain("jzero.pad_batch", "every batched leaf needs the same number of rows", found=[f"rows met: {sorted(sizes)}"])
        )
    (rows,) = sizes
    extra = -rows % multiple

    def pad(leaf: Any) -> Any:
        leaf = leaf if hasattr(leaf, "ndim") else np.asarray(leaf)
        if not is_split(leaf) or not extra:
            return leaf
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        return numpy.concatenate([leaf, numpy.repeat(leaf[-1:], extra, axis=0)])

    mask = np.concatenate([np.ones(rows, np.float32), np.zeros(extra, np.float32)])
    return jax.tree.map(pad, batch), mask
