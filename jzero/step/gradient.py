"""The gradient of a batch as a sum over microbatches, on whatever holds the parameters: one device, shards, or both.

Every quantity here is a *sum*: of losses, of weights, of gradients already divided by the batch's total weight. Sums add up
over microbatches here and over shards in the engines, so one file says what a step computes and none of them says it twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero import _compat
from jzero.step import aux as aux_values
from jzero.step import batch as batches
from jzero.step.aux import AuxLayout, AuxParts
from jzero.step.loss import LossCall, Outcome


class LossProgram(NamedTuple):
    """The user's loss on one microbatch, traced once: inputs are the flat params, batch, rng and model_state."""

    jaxpr: Any
    outcome: Outcome  # of ShapeDtypeStructs
    num_params: int
    num_batch: int
    aux: AuxLayout

    @property
    def is_weighted(self) -> bool:
        return self.outcome.weight is not None


class Sums(NamedTuple):
    """What the microbatches of one batch (or of one shard of it) add up to."""

    grads: list[Any]  # arrays, or `Running`
    loss: jax.Array
    weight: jax.Array
    aux: AuxParts
    model_state: Any


class Running(NamedTuple):
    """The gradient of a parameter that rests away, added up where it rests: the backward pass itself adds to `total`."""

    total: Any
    squares: Any  # of its elements; once they are added up, None


RunLoss = Callable[[Sequence[Any], Any, Any, Any], Outcome]  # (differentiated, microbatch, rng, model_state)


def trace_loss(call: LossCall, params: Any, batch: Any, rng: Any, model_state: Any) -> LossProgram:
    """Trace the loss on (abstract) arguments; nothing is computed."""
    jaxpr, outcome = jax.make_jaxpr(call, return_shape=True)(params, batch, rng, model_state)
    rows = [leaf.shape[0] for leaf in jax.tree.leaves(batch) if batches.is_split(leaf)]
    layout = aux_values.layout(outcome.aux, rows[0] if rows else None)
    return LossProgram(jaxpr, outcome, len(jax.tree.leaves(params)), len(jax.tree.leaves(batch)), layout)


def arguments(params: Sequence[Any], batch: Any, rng: Any, model_state: Any) -> list[Any]:
    """The flat inputs of a `LossProgram`."""
    return [*params, *jax.tree.leaves((batch, rng, model_state))]


def unflatten(program: LossProgram, outputs: Sequence[Any]) -> Outcome:
    return jax.tree.unflatten(jax.tree.structure(program.outcome), outputs)


def total_weight(program: LossProgram, batch: Any, num: int, rngs: Callable[[Any], Any], model_state: Any) -> jax.Array | None:
    """The weight of a weighted loss over all microbatches, before anything else runs; None if it depends on parameters.

    Knowing it first keeps gradients near one in fp16 and makes them final as they appear.
    """
    outputs = jax.tree.leaves(jax.tree.map(lambda _: False, program.outcome)._replace(weight=True))
    pruned, used = _compat.prune(program.jaxpr, outputs)
    if any(used[: program.num_params]) or any(used[program.num_params + program.num_batch + 1 :]):
        return None
    each, shared = batches.split(batch, num)

    def weight(index: Any, rows: Any) -> jax.Array:
        micro = batches.merge(rows, shared)
        flat = arguments([None] * program.num_params, micro, rngs(index), model_state)
        return _compat.evaluate(pruned, [value for value, keep in zip(flat, used, strict=True) if keep])[0]

    if num == 1:
        return weight(0, jax.tree.map(lambda leaf: leaf[0], each))
    return jnp.sum(jax.lax.map(lambda args: weight(*args), (jnp.arange(num), each)))


def accumulate(
    program: LossProgram,
    run_loss: RunLoss,
    diff: Sequence[jax.Array],
    batch: Any,
    *,
    num: int,
    rngs: Callable[[Any], Any],
    model_state: Any,
    seed: jax.Array,
    dtype: Any,
) -> Sums:
    """Sum loss, weight, aux and gradients over `num` microbatches, one after the other.

    Args:
      run_loss: the loss on one microbatch as a function of `diff`, the arrays that are differentiated.
      diff: of each gradient what it is taken of; a `Running` begins as it is given.
      seed: what the loss is multiplied by before its gradient: loss scale / total weight.
      dtype: of the summed gradients.
    """
    each, shared = batches.split(batch, num)

    def one(index: Any, rows: Any, model_state: Any, diff: Sequence[Any]) -> Sums:
        def objective(diff: Sequence[jax.Array]) -> tuple[jax.Array, Outcome]:
            out = run_loss(diff, batches.merge(rows, shared), rngs(index), model_state)
            return out.sum * seed, out

        grads, out = jax.grad(objective, has_aux=True)(list(diff))
        weight = jnp.ones((), jnp.float32) if out.weight is None else out.weight
        parts = aux_values.sort(out.aux, program.aux.kinds, weight)
        grads = [grad if isinstance(grad, Running) else grad.astype(dtype) for grad in grads]
        return Sums(grads, out.sum, weight, parts, out.model_state)

    if num == 1:
        return one(0, jax.tree.map(lambda leaf: leaf[0], each), model_state, diff)

    def body(total: Sums, item: tuple[Any, Any]) -> tuple[Sums, list[jax.Array]]:
        so_far = [grad if isinstance(grad, Running) else leaf for grad, leaf in zip(total.grads, diff, strict=True)]
        part = one(item[0], item[1], total.model_state, so_far)
        batched, part = part.aux.batched, part._replace(aux=part.aux._replace(batched=[]))
        grads = [new if isinstance(new, Running) else old + new for old, new in zip(total.grads, part.grads, strict=True)]
        added = jax.tree.map(jnp.add, _but_grads(total), _but_grads(part))
        return added._replace(grads=grads, model_state=part.model_state), batched

    start = _zeros(program, diff, dtype)._replace(model_state=model_state)
    total, batched = jax.lax.scan(body, start, (jnp.arange(num), each))
    return total._replace(aux=total.aux._replace(batched=[batches.join(leaf) for leaf in batched]))


def _zeros(program: LossProgram, diff: Sequence[jax.Array], dtype: Any) -> Sums:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(lambda aux, weight: aux_values.sort(aux, program.aux.kinds, weight), program.outcome.aux, scalar)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes._replace(batched=[]))
    nothing = jnp.zeros((), jnp.float32)
    grads = [leaf if isinstance(leaf, Running) else jnp.zeros(leaf.shape, dtype) for leaf in diff]
    return Sums(grads, nothing, nothing, zeros, None)


def _but_grads(sums: Sums) -> Sums:
    return sums._replace(grads=[], model_state=None)
