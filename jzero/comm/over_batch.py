"""Means over the whole batch inside a loss: statistics that a loss uses in a way that is not linear in the batch."""

from typing import Any

import jax

from jzero import _compat
from jzero._types import BATCH_AXES


def over_batch_mean(statistics: Any) -> Any:
    """The batch's mean of a statistic, where each shard has computed that of its own examples.

    A load-balancing loss multiplies two means over the tokens; the mean of the shards' products is something else. Computed
    from `over_batch_mean` of both it is exact: on one device, and where jzero keeps the global program, this is the identity;
    where shards compute on their own it is one all-reduce over the batch axes (2 (N-1)/N of the statistics' bytes, in their
    dtype, forward and again backward). jzero's analysis of the loss knows it: what follows is no longer the batch's.

    Under `accumulate` a statistic is that of one microbatch, on one device and on many. Inside a branch that only some
    examples take, a loss keeps the global program (with `reduction="local"` it would wait for the others for ever).

    Args:
      statistics: a pytree of means over examples (or of sums, which it divides by the number of shards: use means).

    Returns:
      The same pytree.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss_fn(w, x):
      ...     mean = over_batch_mean(jnp.mean(x @ w))
      ...     return mean**2  # exact on any mesh
    """
    leaves, treedef = jax.tree.flatten(statistics)
    return jax.tree.unflatten(treedef, _MEAN(*leaves, axes=manual_batch_axes()))


def manual_batch_axes() -> tuple[str, ...]:
    """The axes over which examples are split and that are manual here: each shard then runs a program of its own."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in BATCH_AXES if axis in manual)


def _mean(*leaves: jax.Array, axes: tuple[str, ...]) -> list[jax.Array]:
    return list(jax.lax.pmean(leaves, axes)) if axes and leaves else list(leaves)


_MEAN = _compat.primitive("jzero_over_batch_mean", _mean)
