"""Weights without the optimizer: parameters from disk, everything else fresh."""

import warnings
from typing import Any

import jax

from jzero._errors import explain
from jzero.checkpoint import folder, reading
from jzero.checkpoint.changes import NONE, Changes
from jzero.checkpoint.naming import WHO
from jzero.engine.layout import Layout
from jzero.engine.statics import Statics, split_statics
from jzero.shard import ShardedStep
from jzero.step import TrainStep

PARAMS = frozenset({"params"})


def load(
    found: folder.Found, step: ShardedStep, layout: Layout, statics: Statics, *, cast: bool, into: Any, changes: Changes = NONE
) -> Any:
    """A state whose parameters are read; the other leaves are those of `into`, or a TrainStep's first ones."""
    if into is None and not isinstance(step.fn, TrainStep):
        problem = "weights_only=True needs the other leaves of the state"
        met = [f"{step!r} makes its state itself, so jzero cannot make a fresh optimizer for it"]
        fix = "Pass them: manager.restore(step, weights_only=True, into=step.init(make_state))."
        raise ValueError(explain(f"{WHO}: restore", problem, found=met, fix=fix))
    read = reading.read(found, layout, only=PARAMS, cast=cast, changes=changes)
    if into is None:
        check_known(read, step)
        return _fresh(step, layout, statics, read.leaves)
    state = fill(read, layout, statics, into)
    return step.place(state) if layout.in_files else state  # leaves of two origins come to rest together


def fill(read: reading.Read, layout: Layout, statics: Statics, into: Any) -> Any:
    """The state of what was read and, where nothing was, the leaves of `into`. Says which parameters are new."""
    if read.fresh or read.left:
        found = [f"{name}   not on disk: as in into=" for name in read.fresh] + [f"{name}   left on disk" for name in read.left]
        problem = f"{len(read.fresh)} leaves keep their first values, {len(read.left)} on disk are not used"
        warnings.warn(explain(f"{WHO}: restore", problem, found=found), stacklevel=5)
    rest = jax.tree.leaves(split_statics(into)[0]) if into is not None else read.leaves
    chosen = [old if leaf is None else leaf for leaf, old in zip(read.leaves, rest, strict=True)]
    return statics.merge(jax.tree.unflatten(layout.treedef, chosen))


def check_known(read: reading.Read, step: ShardedStep) -> None:
    """Raise where leaves are new and nobody gave their first values."""
    if read.fresh:
        fix = "Pass their first values: into=step.init(make_state). What is read replaces the rest of it."
        problem = f"{len(read.fresh)} leaves are not on disk"
        raise ValueError(explain(f"{WHO}: restore", problem, found=read.fresh, context=repr(step), fix=fix))


def _fresh(step: ShardedStep, layout: Layout, statics: Statics, leaves: list[Any]) -> Any:
    """`step.fn.init` on the parameters that were read; model_state, which nothing can make anew, must not be there."""
    state = statics.merge(jax.tree.unflatten(layout.treedef, [leaf if leaf is not None else 0 for leaf in leaves]))
    if jax.tree.leaves(state.model_state):
        problem = "weights_only=True cannot make the state's model_state anew"
        fix = "Pass the other leaves: manager.restore(step, weights_only=True, into=step.init(...))."
        raise ValueError(explain(f"{WHO}: restore", problem, found=[repr(step)], fix=fix))
    assert isinstance(step.fn, TrainStep)
    fresh = step.init(step.fn.init, state.params)
    jax.tree.map(lambda leaf: leaf.delete(), [leaf for leaf in leaves if leaf is not None])
    return fresh
