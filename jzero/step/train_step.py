"""`make_train_step`: what one optimizer step computes, pure and without a mesh. Where is the affair of `jzero.shard`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jzero import _compat
from jzero import precision as precisions
from jzero._errors import explain, suggest
from jzero.precision import PrecisionPolicy
from jzero.step import aux as aux_values
from jzero.step import batch as batches
from jzero.step import gradient
from jzero.step import params as parameters
from jzero.step.loss import LossCall
from jzero.step.normalise import Examples, Normaliser, examples_of, normaliser
from jzero.step.state import TrainState, initial_loss_scale
from jzero.step.update import finish, scaled, squares

Reduction = Literal["auto", "global", "local"]
REDUCTIONS = ("auto", "global", "local")
WHO = "jzero.make_train_step"


@dataclass(frozen=True, eq=False)
class TrainStep:
    """`(state, *batch) -> (state, metrics)`: gradient, accumulation, scaling, clipping and update of a loss.

    On one device `jax.jit(train_step)` runs it; `jzero.shard(train_step, stage=...)` runs the same step on a mesh.
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformationExtraArgs
    policy: PrecisionPolicy
    accumulate: int
    clip_norm: float | None
    trainable: Any
    skip_nonfinite: bool
    reduction: Reduction
    call: LossCall = field(repr=False)

    def init(self, params: Any, *args: Any, rng: jax.Array | None = None, model_state: Any = None) -> TrainState:
        """The first state. `params` is a pytree, or a function of `*args` that makes it (so that it can be made sharded).

        Args:
          rng: a typed PRNG key (`jax.random.key`), passed on to a loss that takes `rng`; key 0 if left out.
          model_state: variables that the loss updates itself, for a loss that takes `model_state`.
        """
        if _is_function(params):
            params = params(*args)
        elif args:
            found, fix = [f"{len(args)} extra"], "Write train_step.init(make_params, *args), or train_step.init(params)."
            raise TypeError(
                explain("TrainStep.init", "extra arguments need a function that makes the parameters", found=found, fix=fix)
            )
        params = precisions.cast(jax.tree.map(parameters.as_array, params), self.policy.param)
        leaves, treedef = jax.tree.flatten(params)
        mask = parameters.trainable_mask(params, self.trainable)
        opt_state = self.optimizer.init(parameters.for_optimizer(treedef, leaves, mask))
        opt_state = parameters.store_moments(opt_state, self.policy)
        loss_scale = initial_loss_scale(dynamic=self.policy.scales_loss)
        rng = jax.random.key(0) if rng is None else _typed_key(rng)
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32), rng, loss_scale, model_state)

    def __call__(self, state: TrainState, *batch: Any) -> tuple[TrainState, dict[str, Any]]:
        _check_state(state)
        mask = parameters.trainable_mask(state.params, self.trainable)
        sums, weight, program = self._sums(state, batch, mask)
        factor = weight.gradient_factor(sums.weight, state.loss_scale.scale)
        return self.finish(state, factor, squares(scaled(sums.grads, [factor])), sums, weight.total(sums.weight), program, mask)

    def evaluate(self, state: TrainState, *batch: Any) -> dict[str, Any]:
        """The loss of a batch without its gradient: `{"loss", "weight", "aux"}` as a step would report them. Changes nothing.

        The keys that a loss which takes `rng` gets are those of the next step; a new model_state is dropped.
        """
        _check_state(state)
        nothing = (False,) * len(jax.tree.leaves(state.params))
        sums, weight, program = self._sums(state, batch, nothing)
        return self.evaluation(sums, weight.total(sums.weight), program)

    def evaluation(self, sums: gradient.Sums, weight: jax.Array, program: gradient.LossProgram) -> dict[str, Any]:
        """The metrics of a batch that was only evaluated."""
        averaged = [value / weight for value in sums.aux.averaged]
        aux = aux_values.unsort(sums.aux._replace(averaged=averaged), program.aux)
        return {"loss": sums.loss / weight, "weight": weight, "aux": aux}

    def _sums(
        self, state: TrainState, batch: tuple[Any, ...], mask: Sequence[bool]
    ) -> tuple[gradient.Sums, Normaliser, gradient.LossProgram]:
        """Loss, weight, aux and the gradients of the leaves in `mask`, over all microbatches."""
        batch = jax.tree.map(jnp.asarray, batch)
        batches.check(batch, self.accumulate)
        compute = precisions.cast(state.params, self.policy.compute)
        leaves = jax.tree.leaves(compute)
        key = self.step_key(state)
        rngs = partial(self.microbatch_key, key, shard=0)
        program = self.trace(compute, microbatch_shapes(batch, self.accumulate), rngs(0), state.model_state)
        examples = self.examples(
            compute, microbatch_shapes(batch, self.accumulate), rngs(0), state.model_state, num_parts=self.accumulate
        )
        weight = normaliser(
            program, examples, batch, num_micro=self.accumulate, num_shards=1, rngs=rngs, model_state=state.model_state
        )

        def run_loss(diff: Sequence[Any], micro: Any, rng: Any, model_state: Any) -> Any:
            flat = gradient.arguments(parameters.merge(diff, leaves, mask), micro, rng, model_state)
            return gradient.unflatten(program, _compat.evaluate(program.jaxpr, flat))

        sums = gradient.accumulate(
            program, run_loss, parameters.select(leaves, mask), batch, num=self.accumulate, rngs=rngs,
            model_state=state.model_state, seed=state.loss_scale.scale / weight.before, dtype=self.policy.accumulate,
        )  # fmt: skip
        return sums, weight, program

    def with_loss(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "TrainStep":
        """The same step with its loss wrapped; the wrapper must keep the loss's signature."""
        loss_fn = change(self.loss_fn)
        return replace(self, loss_fn=loss_fn, call=LossCall(loss_fn, has_aux=self.call.has_aux))

    def trace(self, compute: Any, micro: Any, rng: Any, model_state: Any) -> gradient.LossProgram:
        """The loss on one microbatch of these shapes, with parameters in the compute dtype."""
        return gradient.trace_loss(self.call, compute, micro, rng, model_state)

    def examples(self, compute: Any, micro: Any, rng: Any, model_state: Any, *, num_parts: int) -> Examples:
        """How the examples of a microbatch meet in the loss; a batch in one part is traced no further, and counts as a mean."""
        if num_parts == 1:
            return Examples("mean")
        with _compat.mesh_hidden():
            return examples_of(self.call, compute, micro, rng, model_state, num_parts=num_parts)

    def step_key(self, state: TrainState) -> jax.Array:
        """The state's key folded with the step."""
        return jax.random.fold_in(state.rng, state.step)

    def microbatch_key(self, step_key: jax.Array, index: Any, *, shard: Any) -> jax.Array:
        """The key a loss gets: the step's, folded with microbatch and shard."""
        return jax.random.fold_in(jax.random.fold_in(step_key, index), shard)

    def finish(
        self, state: TrainState, factor: jax.Array, leaf_squares: jax.Array, sums: gradient.Sums, weight: jax.Array,
        program: gradient.LossProgram, mask: Sequence[bool],
    ) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
        """The update, from sums over everything; `factor` makes theirs the loss's gradients."""
        found = self.evaluation(sums, weight, program)
        return finish(
            state, sums.grads, factor, leaf_squares=leaf_squares, loss=found["loss"], weight=weight, aux=found["aux"],
            model_state=sums.model_state, mask=mask, optimizer=self.optimizer, policy=self.policy, clip_norm=self.clip_norm,
            skip_nonfinite=self.skip_nonfinite,
        )  # fmt: skip


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        fix = "Make it with train_step.init(params)."
        raise TypeError(explain(WHO, "the state must be a TrainState", found=[f"got {type(state).__name__}"], fix=fix))


def microbatch_shapes(batch: Any, num: int) -> Any:
    """Abstract shapes of one microbatch."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        size = (leaf.shape[0] // num, *leaf.shape[1:]) if batches.is_split(leaf) else leaf.shape
        return jax.ShapeDtypeStruct(size, leaf.dtype)

    return jax.tree.map(shape, batch)


def _is_function(params: Any) -> bool:
    """A function that makes parameters, as opposed to a pytree that can also be called (an equinox module)."""
    leaves = jax.tree.leaves(params)
    return callable(params) and len(leaves) == 1 and leaves[0] is params


def _typed_key(rng: Any) -> jax.Array:
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)


def make_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    precision: "str | PrecisionPolicy" = "fp32",
    accumulate: int = 1,
    clip_norm: float | None = None,
    has_aux: bool = False,
    trainable: Any = None,
    skip_nonfinite: bool = True,
    reduction: Reduction = "auto",
) -> TrainStep:
    """A train step from a loss and an optimizer: pure, mesh-free, `jax.jit(train_step)(state, batch)` just works.

    Args:
      loss_fn: `loss_fn(params, *batch[, rng][, model_state])` gives a scalar, or `jzero.weighted(sum, weight)`; with
        `has_aux` a pair `(loss, aux)`. `rng` is passed if the loss has a parameter of that name (the state's key folded with
        step, microbatch and shard), `model_state` likewise, and then aux is `{"model_state": new, ...}`.
      optimizer: any optax transformation. Its update sees whole tensors in float32.
      precision: "fp32", "bf16", "fp16" (dynamic loss scale), "bf16-pure" (stochastic rounding), or a `PrecisionPolicy`.
      accumulate: microbatches per step. Microbatch i holds rows i, i + accumulate, ... of the batch. A mean loss is averaged
        over microbatches and a sum added up; only `weighted` is exact when microbatches hold unequal numbers of valid elements.
      clip_norm: largest global gradient norm, before the optimizer.
      has_aux: the loss returns `(loss, aux)`. Aux scalars are averaged with the loss's weights, `jzero.summed(x)` is added up,
        arrays keep their batch dim.
      trainable: bool pytree like params, or path -> bool. Frozen leaves get no gradient and no optimizer memory.
      skip_nonfinite: leave the state unchanged where loss or gradient is not finite or the total weight is zero.
      reduction: on a mesh, "auto" computes shards on their own where examples provably meet only in the final mean, and else
        keeps the exact global program; "global" insists on that; "local" accepts means of shards, as DDP and DeepSpeed do.

    Returns:
      A `TrainStep`: call `.init(params)` for a `TrainState`, then `train_step(state, *batch) -> (state, metrics)` with metrics
      `loss`, `grad_norm` (before clipping), `loss_scale`, `skipped`, `num_skipped`, `aux`, and for `jzero.check` also `step`,
      `weight`, `nonfinite`.

    Raises:
      ValueError, TypeError: an unknown preset, `accumulate` below one, a loss that is not scalar, ...: before anything runs.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> step = make_train_step(lambda w, x, y: jnp.mean((x @ w - y) ** 2), optax.sgd(0.1))
      >>> state = step.init(jnp.zeros(3))
      >>> state, metrics = jax.jit(step)(state, jnp.eye(3), jnp.ones(3))
      >>> print(round(float(metrics["loss"]), 3))
      1.0
    """
    policy = precisions.get(precision)
    _check_callables(loss_fn, optimizer)
    _check_numbers(accumulate, clip_norm)
    if reduction not in REDUCTIONS:
        found, fix = [f"reduction={reduction!r}"], suggest(reduction, REDUCTIONS)
        raise ValueError(explain(WHO, "unknown reduction", found=found, fix=fix))
    if policy.scales_loss and not skip_nonfinite:
        found, fix = (
            ["skip_nonfinite=False", f"compute={jnp.dtype(policy.compute).name}"],
            "Use bf16, or leave skip_nonfinite=True.",
        )
        raise ValueError(explain(WHO, "fp16 lives by skipping overflows", found=found, fix=fix))
    return TrainStep(
        loss_fn, optax.with_extra_args_support(optimizer), policy, accumulate, clip_norm, trainable, skip_nonfinite, reduction,
        LossCall(loss_fn, has_aux=has_aux),
    )  # fmt: skip


def _check_callables(loss_fn: Any, optimizer: Any) -> None:
    if not callable(loss_fn):
        fix = "Write make_train_step(loss_fn, optimizer) with loss_fn(params, *batch) -> loss."
        raise TypeError(explain(WHO, "loss_fn must be callable", found=[f"got {type(loss_fn).__name__}"], fix=fix))
    if not hasattr(optimizer, "update") or not hasattr(optimizer, "init"):
        found, fix = [f"got {type(optimizer).__name__}"], "Such as optax.adamw(3e-4)."
        raise TypeError(explain(WHO, "optimizer must be an optax GradientTransformation", found=found, fix=fix))


def _check_numbers(accumulate: Any, clip_norm: Any) -> None:
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        found, fix = [f"accumulate={accumulate!r}"], "accumulate=1 is one microbatch."
        raise ValueError(explain(WHO, "accumulate must be a positive integer", found=found, fix=fix))
    if clip_norm is not None and not clip_norm > 0:
        found, fix = [f"clip_norm={clip_norm!r}"], "clip_norm=None does not clip."
        raise ValueError(explain(WHO, "clip_norm must be positive", found=found, fix=fix))
