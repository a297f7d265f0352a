"""What a batch's loss is divided by, known before its gradient where it can be.

A mean of k microbatches on N shards is divided by k N, a sum by one, a weighted loss by its total weight.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from jzero import reduction as reductions
from jzero.step import batch as batches
from jzero.step import gradient
from jzero.step.loss import LossCall, Outcome, Summed


class Meeting(NamedTuple):
    """An output of a loss in which examples meet before the final mean, and the line where they do."""

    what: str
    where: str


class Examples(NamedTuple):
    """How the examples of a batch meet in a loss: "mean" and "sum" can be computed shard by shard, "mixed" cannot."""

    kind: Literal["mean", "sum", "mixed"]
    notes: tuple[str, ...] = ()
    meetings: tuple[Meeting, ...] = ()  # why it is mixed
    program: Any = None  # the jaxpr that was looked at


class Normaliser(NamedTuple):
    """`before` divides the loss before its gradient. Where the weight depends on parameters, it is only a first guess."""

    before: jax.Array
    exact: bool

    def total(self, measured: jax.Array) -> jax.Array:
        """The true total weight, given what the microbatches' weights added up to."""
        return self.before if self.exact else measured

    def gradient_factor(self, measured: jax.Array, scale: jax.Array) -> jax.Array:
        """What turns summed gradients into the gradient of the loss: undoes the loss scale, and a wrong guess."""
        return 1.0 / scale if self.exact else self.before / (_nonzero(measured) * scale)


def normaliser(
    program: gradient.LossProgram, examples: Examples, batch: Any, *, num_micro: int, num_shards: int,
    rngs: Callable[[Any], Any], model_state: Any, add_up: Callable[[jax.Array], jax.Array] = lambda value: value,
) -> Normaliser:  # fmt: skip
    """The normaliser of a batch; `add_up` sums over shards."""
    if not program.is_weighted:
        return Normaliser(jnp.float32(1.0 if examples.kind == "sum" else num_micro * num_shards), exact=True)
    weight = gradient.total_weight(program, batch, num_micro, rngs, model_state)
    if weight is None:
        rows = next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if batches.is_split(leaf)), 1)
        return Normaliser(jnp.float32(rows * num_shards), exact=False)
    return Normaliser(_nonzero(add_up(weight)), exact=False)


def _nonzero(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)


def examples_of(call: LossCall, params: Any, micro: Any, rng: Any, model_state: Any, *, num_parts: int) -> Examples:
    """Follow the batch dim through the loss (never its values): do examples meet only in one final mean or sum?

    Args:
      micro: shapes of one part of the batch.
      num_parts: microbatches times shards that the batch is cut into.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, micro, rng, model_state))
    flat, treedef = jax.tree.flatten(shapes)
    start = len(jax.tree.leaves(params))
    is_batch = range(start, start + len(jax.tree.leaves(micro)))
    dims = [0 if index in is_batch and batches.is_split(leaf) else None for index, leaf in enumerate(flat)]
    seen: list[Outcome] = []

    def flat_loss(*leaves: Any) -> list[Any]:
        outcome = call(*jax.tree.unflatten(treedef, leaves))
        seen[:] = [jax.eval_shape(lambda: outcome)]
        return jax.tree.leaves(outcome)

    factor = max(2, num_parts)
    with pallas_kernels.by_definition():
        verdict = reductions.analyze(flat_loss, flat, dims, factor=factor)
    ranks = [leaf.ndim for leaf in jax.tree.leaves(seen[0])]
    return _judge(verdict, jax.tree.unflatten(jax.tree.structure(seen[0]), range(len(ranks))), ranks, factor)


def _judge(verdict: reductions.Verdict, outcome: Outcome, ranks: list[int], factor: int) -> Examples:
    """From the state of every output to one word: a mixed loss, a batched aux array that is not by example, or a model state
    that the batch touches keep the global program. Averaged aux scalars have a stated reduction and do not.
    """
    states = verdict.outputs
    loss = states[outcome.sum]
    is_sum = reductions.is_sum(loss, factor=factor)
    if outcome.weight is None:
        mixed = _unless(is_sum or reductions.is_mean(loss), "loss", loss)
    else:
        weight = states[outcome.weight]
        alike = (is_sum and reductions.is_sum(weight, factor=factor)) or (
            reductions.is_mean(loss) and reductions.is_mean(weight)
        )
        mixed = _unless(alike, "weighted loss", loss if isinstance(loss, reductions.Mixed) else weight)
    for leaf in jax.tree.leaves(outcome.model_state):
        mixed += _unless(states[leaf] == reductions.INDEPENDENT, "model_state", states[leaf])
    for value in jax.tree.leaves(outcome.aux, is_leaf=lambda leaf: isinstance(leaf, Summed)):
        for leaf in jax.tree.leaves(value):
            stated = isinstance(value, Summed) or ranks[leaf] == 0
            mixed += _unless(stated or states[leaf] == reductions.PerExample(0), "aux", states[leaf])
    if mixed:
        return Examples("mixed", (), tuple(dict.fromkeys(mixed)), verdict.program)
    kind = "sum" if outcome.weight is None and is_sum and not reductions.is_mean(loss) else "mean"
    notes = ("the loss is a sum over examples: shards and microbatches are added, not averaged",) if kind == "sum" else ()
    return Examples(kind, notes, (), verdict.program)


def _unless(fine: bool, what: str, state: Any) -> list[Meeting]:
    if fine:
        return []
    return [Meeting(what, f"{state.where}: {state.reason}" if isinstance(state, reductions.Mixed) else f"it is {state}")]
