"""What a batch's loss is divided by, known before its gradient where it can be.

A mean of k microbatches on N shards is divided by k N, a sum by one, a weighted loss by its total weight.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jzero import reduction as reductions
from jzero.step import batch as batches
from jzero.step import gradient
from jzero.step.loss import LossCall, Outcome, Summed


class Examples(NamedTuple):
    """How the examples of a batch meet in a loss: "mean" and "sum" can be computed shard by shard, "mixed" cannot."""

    kind: Literal["mean", "sum", "mixed"]
    findings: tuple[str, ...]


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
    program: gradient.LossProgram, examples: Examples, batch: Any, *, num_micro: int, num_shards: int, rngs: Callable[[Any], Any],
    model_state: Any, add_up: Callable[[jax.Array], jax.Array] = lambda value: value,
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


def examples_of(call: LossCall, params: Any, micro: Any, rng: Any, model_state: Any) -> Examples:
    """Follow the batch dim through the loss (never its values): do examples meet only in one final mean or sum?"""
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

    verdict = reductions.analyze(flat_loss, flat, dims)
    ranks = [leaf.ndim for leaf in jax.tree.leaves(seen[0])]
    return _judge(verdict, jax.tree.unflatten(jax.tree.structure(seen[0]), range(len(ranks))), ranks)


def _judge(verdict: Any, outcome: Outcome, ranks: list[int]) -> Examples:
    """From the state of every output to one word: a mixed loss, a batched aux array that is not by example, or a model state
    that the batch touches keep the global program. Averaged aux scalars have a stated reduction and do not."""
    state = verdict.outputs
    loss = state[outcome.sum]
    mixed = [] if outcome.weight is None else _unless(_same_sum(loss, state[outcome.weight]), "loss weight", state[outcome.weight])
    if outcome.weight is None:
        mixed += _unless(reductions.is_mean(loss) or reductions.is_sum(loss), "loss", loss)
    for leaf in jax.tree.leaves(outcome.model_state):
        mixed += _unless(reductions.is_independent(state[leaf]), "model_state", state[leaf])
    for value in jax.tree.leaves(outcome.aux, is_leaf=lambda leaf: isinstance(leaf, Summed)):
        for leaf in jax.tree.leaves(value):
            stated = isinstance(value, Summed) or ranks[leaf] == 0
            mixed += _unless(stated or reductions.is_per_example(state[leaf], 0), "aux", state[leaf])
    if mixed:
        return Examples("mixed", (*mixed, *verdict.findings))
    kind = "sum" if outcome.weight is None and reductions.is_sum(loss) and not reductions.is_mean(loss) else "mean"
    notes = ("the loss is a sum over examples: shards and microbatches are added, not averaged",) if kind == "sum" else ()
    return Examples(kind, notes)


def _same_sum(loss: Any, weight: Any) -> bool:
    both_sums = reductions.is_sum(loss) and reductions.is_sum(weight)
    return both_sums or (reductions.is_mean(loss) and reductions.is_mean(weight))


def _unless(fine: bool, what: str, state: Any) -> list[str]:
    return [] if fine else [f"{what}: {reductions.explain_mixed(state)}"]
