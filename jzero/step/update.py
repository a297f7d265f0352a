"""From summed gradients to the next state: norm, clipping, the optimizer, and what a step that must be skipped leaves alone.

Runs on whole tensors, also when they are sharded: LAMB's trust ratio, Adafactor's factors, Muon's matrix and a global norm
must mean what they mean on one device, so sharding here is placement only.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jzero._errors import explain
from jzero._tree import is_key, named_leaves
from jzero.precision import PrecisionPolicy, round_stochastically, sum_of_squares
from jzero.step import params as parameters
from jzero.step.gradient import Running
from jzero.step.state import TrainState, next_loss_scale
from pallas_kernels.rounding import fold

_ROUNDING_STREAM = 0x5A  # folded into the step's key, apart from the microbatch indices


@jax.tree_util.register_pytree_node_class
class NonFinite:
    """One flag per trained leaf, `True` where its gradient has a NaN or infinity; the paths travel as static data."""

    def __init__(self, flags: Any, paths: tuple[str, ...]):
        self.flags, self.paths = flags, paths

    def tree_flatten(self) -> tuple[tuple[Any], tuple[str, ...]]:
        return (self.flags,), self.paths

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], children: tuple[Any]) -> "NonFinite":
        return cls(children[0], paths)


def squares(grads: Sequence[Any]) -> jax.Array:
    """Sum of squares of each leaf, float32[num_leaves]."""
    of = lambda grad: jnp.sum(grad.squares) if isinstance(grad, Running) else sum_of_squares(grad)
    return jnp.stack([of(grad) for grad in grads])


class Verdict(NamedTuple):
    """What all gradients together say of a step."""

    scales: list[jax.Array]  # what gradients are multiplied by, one after the other: to clip them
    norm: jax.Array  # float32[], before clipping
    proceed: jax.Array  # bool[]


def judge(
    leaf_squares: jax.Array, loss: jax.Array, weight: jax.Array, clip_norm: float | None, skip_nonfinite: bool
) -> Verdict:  # fmt: skip
    """Norm, clipping, and whether the update is made. Weight zero skips the step, as do a NaN and an infinity."""
    norm = jnp.sqrt(jnp.sum(leaf_squares))
    clean = jnp.isfinite(norm) & jnp.isfinite(loss) & (weight != 0)
    scales = [] if clip_norm is None else [jnp.where(norm > clip_norm, clip_norm / norm, 1.0)]
    return Verdict(scales, norm, clean if skip_nonfinite else jnp.ones((), bool))


def scaled(grads: Sequence[Any], scales: Sequence[jax.Array]) -> list[Any]:
    """Gradients times each of the scalars in turn; what is no array is None."""
    grads = [None if isinstance(grad, Running) else grad for grad in grads]
    for scale in scales:
        grads = [None if grad is None else grad * scale.astype(grad.dtype) for grad in grads]
    return grads


def conclude(
    state: TrainState, after: TrainState, verdict: Verdict, leaf_squares: jax.Array, loss: jax.Array, weight: jax.Array,
    aux: Any, mask: Sequence[bool], policy: PrecisionPolicy,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """The state to go on with, `after` or the old one, and the metrics."""
    proceed = verdict.proceed
    after = jax.tree.map(partial(where, proceed), after, state)
    after = after._replace(loss_scale=next_loss_scale(state.loss_scale, proceed, dynamic=policy.scales_loss))
    paths = tuple(path for (path, _), kept in zip(named_leaves(state.params), mask, strict=True) if kept)
    metrics = {
        "loss": loss,
        "grad_norm": verdict.norm,
        "loss_scale": state.loss_scale.scale,
        "skipped": ~proceed,
        "num_skipped": after.loss_scale.num_skipped,
        "aux": aux,
        "step": after.step,
        "weight": weight,
        "nonfinite": NonFinite(~jnp.isfinite(leaf_squares), paths),
    }
    return after, metrics


def finish(
    state: TrainState,
    grads: Sequence[jax.Array],
    factor: jax.Array,
    *,
    leaf_squares: jax.Array,
    loss: jax.Array,
    weight: jax.Array,
    aux: Any,
    model_state: Any,
    mask: Sequence[bool],
    optimizer: optax.GradientTransformationExtraArgs,
    policy: PrecisionPolicy,
    clip_norm: float | None,
    skip_nonfinite: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """The next state and the metrics, from summed gradients of the leaves that train.

    Args:
      factor: what makes sums the loss's gradients.
      leaf_squares: each gradient's (times `factor`) sum of squares over the whole tensor; not finite where the gradient is not.
      loss, weight: the batch's loss and total weight; weight zero skips the step.
    """
    verdict = judge(leaf_squares, loss, weight, clip_norm, skip_nonfinite)
    grads = scaled(grads, [factor, *verdict.scales])
    params, opt_state = optimize(state, grads, mask, optimizer, policy, loss)
    after = TrainState(params, opt_state, state.step + 1, state.rng, state.loss_scale, model_state)
    return conclude(state, after, verdict, leaf_squares, loss, weight, aux, mask, policy)


def where(proceed: jax.Array, new: Any, old: Any) -> Any:
    """One leaf of the next state, a key too."""
    if new is old:
        return old
    if is_key(old):
        data = jnp.where(proceed, jax.random.key_data(new), jax.random.key_data(old))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(old))
    return jnp.where(proceed, new, old).astype(jnp.asarray(old).dtype)


def optimize(
    state: TrainState,
    grads: Sequence[jax.Array],
    mask: Sequence[bool],
    optimizer: optax.GradientTransformationExtraArgs,
    policy: PrecisionPolicy,
    loss: jax.Array,
) -> tuple[Any, Any]:
    """The next parameters and optimizer state; of `state` it reads `params`, `opt_state`, `step` and `rng`."""
    leaves, treedef = jax.tree.flatten(state.params)
    wide = parameters.for_optimizer(treedef, leaves, mask)
    grad_tree = parameters.for_optimizer(treedef, parameters.merge(grads, leaves, mask), mask)
    kinds = jax.eval_shape(optimizer.init, wide)
    opt_state = jax.tree.map(lambda kept, kind: kept.astype(kind.dtype), state.opt_state, kinds)
    updates, opt_state = optimizer.update(grad_tree, opt_state, wide, value=loss)
    new = jax.tree.leaves(optax.apply_updates(wide, updates))
    seed = jax.random.bits(jax.random.fold_in(jax.random.fold_in(state.rng, state.step), _ROUNDING_STREAM), (), jnp.uint32)
    opt_state = _stored_moments(opt_state, policy, fold(seed, len(new)))
    olds = parameters.select(leaves, mask)
    stored = [_stored(value, old.dtype, fold(seed, index)) for index, (value, old) in enumerate(zip(new, olds, strict=True))]
    return jax.tree.unflatten(treedef, parameters.merge(stored, leaves, mask)), opt_state


def _stored(value: jax.Array, dtype: Any, seed: jax.Array) -> jax.Array:
    return round_stochastically(value, dtype, seed) if jnp.dtype(dtype).itemsize < value.dtype.itemsize else value.astype(dtype)


def _stored_moments(opt_state: Any, policy: PrecisionPolicy, seed: jax.Array) -> Any:
    """Moments rounded stochastically too: at b2 = 0.999 the second moment moves by less than bfloat16 can tell apart."""
    count = iter(range(len(jax.tree.leaves(opt_state))))
    return parameters.store_moments(opt_state, policy, lambda leaf, dtype: _stored(leaf, dtype, fold(seed, next(count))))


def check(metrics: dict[str, Any]) -> None:
    """Raise if the step that returned `metrics` met a NaN or infinity, or a batch of total weight zero.

    Reads a few scalars from the device, so it waits for the step.

    Raises:
      FloatingPointError: names the step, the loss, and the first leaf whose gradient is not finite.
    """
    flags, paths = jax.device_get(metrics["nonfinite"].flags), metrics["nonfinite"].paths
    loss, weight = float(metrics["loss"]), float(metrics["weight"])
    bad = [path for path, flag in zip(paths, flags, strict=True) if flag]
    if not bad and jnp.isfinite(loss) and weight != 0 and jnp.isfinite(metrics["grad_norm"]):
        return
    found = [f"loss {loss}", f"total weight {weight}", f"grad_norm {float(metrics['grad_norm'])}"]
    found += [f"first non-finite gradient: {bad[0]} ({len(bad)} of {len(paths)} leaves)"] if bad else []
    outcome = "the update was skipped" if bool(metrics["skipped"]) else "the update was made (skip_nonfinite=False)"
    context = f"after {int(metrics['step'])} updates; loss scale {float(metrics['loss_scale'])}; {outcome}"
    fix = (
        "A total weight of zero means that every example was masked."
        if weight == 0
        else "Run the batch under jax.debug_nans to find the operation."
    )
    raise FloatingPointError(
        explain("jzero.check", f"step {int(metrics['step'])} is not finite", found=found, context=context, fix=fix)
    )
