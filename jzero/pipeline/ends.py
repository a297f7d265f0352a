"""The two ends of a pipeline, on flat leaves: the embedding, and the head with its loss, its gradient and its aux."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero.pipeline.model import Pipeline, seen_by
from jzero.step import aux as aux_values
from jzero.step.loss import LossCall, Outcome

ENDS = ("embed", "head", "tied")


class HeadSums(NamedTuple):
    """What the heads of a step's microbatches add up to; `batched` has a row per microbatch."""

    loss: jax.Array
    weight: jax.Array
    averaged: list[jax.Array]
    summed: list[Any]
    batched: list[jax.Array]


class Ends:
    """Embedding and head of one model as functions of the flat leaves of `{"embed", "head", "tied"}`."""

    def __init__(self, model: Pipeline, outer: Any, mask: Sequence[bool], x: Any, *, has_aux: bool, kinds: tuple[Any, ...]):
        leaves, self.treedef = jax.tree.flatten(outer)
        names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(outer)]
        trained = [index for index, yes in enumerate(mask) if yes]
        self.num_leaves, self.x_treedef, self.kinds = len(leaves), jax.tree.structure(x), kinds
        self.embed_leaves = [index for index, name in enumerate(names) if name != "head"]
        self.head_leaves = [index for index, name in enumerate(names) if name != "embed"]
        self.embed_trained = [index for index in trained if names[index] != "head"]
        self.head_trained = [index for index in trained if names[index] != "embed"]
        self._embed = model.embed
        self._call = LossCall(lambda params, x, *batch: model.head(params, x, *batch), has_aux=has_aux)

    def embed(self, leaves: Sequence[Any], batch: Any) -> list[Any]:
        return jax.tree.leaves(self._embed(seen_by("embed", self._outer(leaves)), *batch))

    def embed_grad(self, leaves: Sequence[Any], batch: Any, dx: Sequence[Any]) -> list[Any]:
        """Gradients of `embed_trained`."""

        def run(trained: Sequence[Any]) -> list[Any]:
            return self.embed(_replaced(leaves, self.embed_trained, trained), batch)

        return jax.vjp(run, [leaves[index] for index in self.embed_trained])[1](list(dx))[0]

    def head(self, leaves: Sequence[Any], x: Sequence[Any], batch: Any) -> Outcome:
        tree = jax.tree.unflatten(self.x_treedef, x)
        return self._call(seen_by("head", self._outer(leaves)), (tree, *batch), None, None)

    def head_grad(
        self, leaves: Sequence[Any], x: Sequence[Any], batch: Any, seed: Any
    ) -> tuple[list[Any], list[Any], HeadSums]:
        """The gradient of the loss times `seed`: of x, and of `head_trained`; and the loss."""

        def objective(trained: Sequence[Any], x: Sequence[Any]) -> tuple[jax.Array, Outcome]:
            out = self.head(_replaced(leaves, self.head_trained, trained), x, batch)
            return out.sum * seed, out

        trained = [leaves[index] for index in self.head_trained]
        (grads, dx), out = jax.grad(objective, argnums=(0, 1), has_aux=True)(trained, list(x))
        return dx, grads, self.sums(out)

    def sums(self, out: Outcome) -> HeadSums:
        weight = jnp.ones((), jnp.float32) if out.weight is None else out.weight
        parts = aux_values.sort(out.aux, self.kinds, weight)
        return HeadSums(out.sum, weight, parts.averaged, parts.summed, parts.batched)

    def _outer(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)


def _replaced(leaves: Sequence[Any], indices: Sequence[int], values: Sequence[Any]) -> list[Any]:
    out = list(leaves)
    for index, value in zip(indices, values, strict=True):
        out[index] = value
    return out
