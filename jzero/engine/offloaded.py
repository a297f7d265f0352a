"""The engine for steps whose state rests off the device: a gradient program, then one update program per bucket.

The gradient program is the composed engine's (or the pipeline's) with another end: instead of the optimizer's update it gives
out gradients, whether the step proceeds, and the update's early values (`jzero/offload/split.py`). It never sees the
optimizer's arrays. Update programs run under Auto axes on the bucket's leaves, as the whole update does otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jzero import _compat
from jzero._errors import explain
from jzero.engine import computing, fetching, resting
from jzero.engine.computing import Computed
from jzero.engine.layout import Layout, Options
from jzero.offload import buckets as packing
from jzero.offload import split as splitting
from jzero.offload.buckets import Bucket
from jzero.offload.places import bytes_on_one_device, can_go
from jzero.offload.split import Input, Split
from jzero.step import TrainState, TrainStep, gradient, update
from jzero.step import params as parameters
from jzero.step.gradient import Running


class Carried(NamedTuple):
    """What the gradient program hands to the update programs."""

    grads: list[jax.Array]  # sums of the parameters that train, in their shards
    scales: list[jax.Array]  # what makes them gradients, clipped; multiplied here they would be twice in memory
    proceed: jax.Array
    shared: list[jax.Array]  # the optimizer's scalars before the step, step, rng, loss
    early: list[jax.Array]


@dataclass(frozen=True)
class Update:
    """A traced update and its buckets, for one layout."""

    layout: Layout
    mask: tuple[bool, ...]
    split: Split
    buckets: list[Bucket]
    bucket_bytes: int
    accumulate_dtype: Any
    num_scales: int
    compute_dtype: Any = None
    computed: Computed = field(default_factory=Computed)
    at_use: frozenset[int] = frozenset()  # numbers of the parameters whose gradients are in host memory
    late: frozenset[int] = frozenset()  # numbers of small leaves of the optimizer's that need its arrays: they go with a bucket

    @cached_property
    def trained(self) -> list[int]:
        """The numbers of the leaves that train; parameters come first in a TrainState."""
        return [index for index, trains in enumerate(self.mask) if trains]

    @cached_property
    def arrays(self) -> list[int]:
        """The numbers of the optimizer's arrays, which the gradient program does not see."""
        goes = lambda index: index in self.late or can_go(self.layout.placements[index].leaf)
        return [index for index in _opt_leaves(self.layout) if goes(index)]

    @cached_property
    def scalars(self) -> list[int]:
        """The numbers of the rest of it: counters, rates, small tables that all leaves share."""
        return [index for index in _opt_leaves(self.layout) if index not in self.arrays]

    @cached_property
    def kept(self) -> list[int]:
        """The numbers of the leaves that the gradient program sees."""
        away = set(self.arrays)
        return [index for index in range(len(self.layout.avals)) if index not in away]

    @cached_property
    def held(self) -> frozenset[int]:
        """The numbers of the parameters in files that the update need not read again: in the dtype of what was brought."""
        layout, seen = self.layout, self.layout.brought(self.compute_dtype)
        same = lambda index: layout.avals[index].dtype == seen.avals[index].dtype
        return frozenset(index for index in layout.in_files if self.mask[index] and same(index))

    @cached_property
    def grads(self) -> list[tuple[int, jax.ShapeDtypeStruct]]:
        """What the gradient program hands to the update of single leaves: the number of the leaf whose shape and place it has,
        and what it is.
        """
        avals = self.layout.avals
        return [(index, jax.ShapeDtypeStruct(avals[index].shape, self.accumulate_dtype)) for index in self.trained]

    @cached_property
    def shared(self) -> list[jax.ShapeDtypeStruct]:
        """What it hands to all of them, whole on every device: the optimizer's scalars before the step, step, rng, loss."""
        state = jax.tree.unflatten(self.layout.treedef, self.layout.avals)
        scalars = [self.layout.avals[index] for index in self.scalars]
        return [*scalars, state.step, state.rng, jax.ShapeDtypeStruct((), jnp.float32)]

    @property
    def num_outputs(self) -> tuple[int, int, int]:
        return len(self.trained), len(self.arrays), len(self.scalars)

    def inputs(self, params: Sequence[Any], grads: Sequence[Any], arrays: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
        """The traced update's inputs in order."""
        return [*self.split.consts, *params, *grads, *arrays, *shared]

    def rest(self, state: Any) -> Any:
        """The state as the gradient program sees it."""
        opt_leaves = jax.tree.leaves(state.opt_state)
        numbers = dict(zip(_opt_leaves(self.layout), opt_leaves, strict=True))
        return state._replace(opt_state=[numbers[index] for index in self.scalars])

    @cached_property
    def rest_layout(self) -> Layout:
        """The layout of `rest`, with parameters that no program takes where they rest on the device."""
        layout = self.layout.brought(self.compute_dtype)
        avals = self.rest(jax.tree.unflatten(layout.treedef, layout.avals))
        return replace(layout.only(self.kept), treedef=jax.tree.structure(avals))


def _opt_leaves(layout: Layout) -> list[int]:
    state = jax.tree.unflatten(layout.treedef, range(len(layout.avals)))
    return jax.tree.leaves(state.opt_state)


def prepare(step: TrainStep, layout: Layout, options: Options) -> Update:
    """The update traced and cut into buckets. Nothing is allocated; an optimizer that cannot be cut is an error."""
    assert options.offload is not None
    state = jax.tree.unflatten(layout.treedef, layout.avals)
    mask = parameters.trainable_mask(state.params, step.trainable)
    num_scales, policy = 1 + (step.clip_norm is not None), step.policy
    bare = Update(
        layout, mask, None, [], 0, policy.accumulate, num_scales, policy.compute,  # pyrefly: ignore[bad-argument-type]
        at_use=frozenset(fetching.candidates(layout, options)),  # until a batch's shape is known
    )  # fmt: skip
    found = splitting.split(*_traced(step, bare), num_scalars=len(bare.scalars))
    while found.late:  # scales of 8-bit moments, say
        bare = replace(bare, late=bare.late | {bare.scalars[at] for at in found.late})
        found = splitting.split(*_traced(step, bare), num_scalars=len(bare.scalars))
    nodes, _ = _nodes(bare)
    node_of = {index: node for node, index in enumerate(bare.trained)} | dict(zip(bare.arrays, nodes, strict=True))
    plan = replace(bare, split=found)
    _check_nothing_waits(plan)
    return packed(plan, node_of, options)


def packed(plan: Update, node_of: dict[int, int], options: Options) -> Update:
    """The update with its buckets. `node_of`: the node of each leaf that has one, by the leaf's number."""
    assert options.offload is not None
    groups, asked = _groups(plan, node_of), options.offload.update
    reasons = computing.reasons(plan, groups, asked)  # may be an error, so before anything is measured
    size = resting.bucket_bytes(plan.layout, options)
    plan = replace(plan, bucket_bytes=size)
    groups, computed = computing.choose(plan, groups, reasons, asked)
    return replace(plan, buckets=packing.pack(groups, size), computed=computed)


def _traced(step: TrainStep, update_: Update) -> tuple[Any, list[Input], int, list[str]]:
    """The jaxpr of the whole update, what its inputs are, and the names of their nodes."""
    layout, trained = update_.layout, update_.trained
    params = [layout.avals[index] for index in trained]
    grads = [aval for _, aval in update_.grads]
    arrays, shared = [layout.avals[index] for index in update_.arrays], update_.shared

    def run(params: list[Any], grads: list[Any], arrays: list[Any], shared: list[Any]) -> list[Any]:
        *scalars, number, rng, loss = shared
        full = dict(zip([*trained, *update_.arrays, *update_.scalars], [*params, *arrays, *scalars], strict=True))
        every = [full.get(index, layout.avals[index]) for index in range(len(layout.avals))]
        before = jax.tree.unflatten(layout.treedef, every)._replace(step=number, rng=rng)
        new_params, new_opt = update.optimize(before, grads, update_.mask, step.optimizer, step.policy, loss)
        numbers = dict(zip(_opt_leaves(layout), jax.tree.leaves(new_opt), strict=True))
        chosen = parameters.select(jax.tree.leaves(new_params), update_.mask)
        avals = [layout.avals[index] for index in (*update_.arrays, *update_.scalars)]
        opt = [numbers[index] for index in (*update_.arrays, *update_.scalars)]
        return [
            *chosen,
            *[new.astype(old.dtype) if new.dtype != old.dtype else new for new, old in zip(opt, avals, strict=True)],
        ]

    nodes, names = _nodes(update_)
    is_away = [layout.places[index] is not None for index in trained]
    inputs = [Input(node, away) for node, away in enumerate(is_away)] + [Input(node, False) for node in range(len(trained))]
    inputs += [Input(node, True) for node in nodes] + [Input(None, False)] * len(shared)
    return jax.make_jaxpr(run)(params, grads, arrays, shared), inputs, len(trained), names


def _nodes(update_: Update) -> tuple[list[int], list[str]]:
    """For each of the optimizer's arrays its parameter's node, or one of its own; and the names of all nodes."""
    layout = update_.layout
    position = {index: node for node, index in enumerate(update_.trained)}
    names = [layout.placements[index].leaf.path for index in update_.trained]
    nodes = []
    for index in update_.arrays:
        leaf = layout.placements[index].leaf
        if leaf.owner not in position:
            names.append(leaf.path)
        nodes.append(position[leaf.owner] if leaf.owner in position else len(names) - 1)
    return nodes, names


def _groups(update_: Update, node_of: dict[int, int]) -> list[Bucket]:
    layout = update_.layout
    groups = []
    for group in map(set, update_.split.groups):
        params, opt_state = (
            tuple(index for index in part if node_of[index] in group) for part in (update_.trained, update_.arrays)
        )
        moved = [index for index in (*params, *opt_state) if layout.places[index] is not None]
        size = sum(bytes_on_one_device(layout.placements[index].leaf, layout.on_device[index]) for index in moved)
        groups.append(Bucket(params, opt_state, size))
    return sorted(groups, key=lambda bucket: (*bucket.params, *bucket.opt_state))


@dataclass(frozen=True, eq=False)
class GradientStep(TrainStep):
    """A train step that ends before its update."""

    update: Any = None  # an Update

    def finish(
        self, state: TrainState, factor: jax.Array, leaf_squares: jax.Array, sums: gradient.Sums, weight: jax.Array,
        program: gradient.LossProgram, mask: Sequence[bool],
    ) -> tuple[TrainState, Any]:  # fmt: skip
        """The state with all but parameters and optimizer arrays moved on, the metrics, and what the buckets need."""
        found = self.evaluation(sums, weight, program)
        loss, plan = found["loss"], self.update
        verdict = update.judge(leaf_squares, loss, weight, self.clip_norm, self.skip_nonfinite)
        scales = [factor, *verdict.scales]
        shared = [*state.opt_state, state.step, state.rng, loss.astype(jnp.float32)]
        scalars, early = _first(plan, jax.tree.leaves(state.params), update.scaled(sums.grads, scales), shared)
        after = TrainState(state.params, scalars, state.step + 1, state.rng, state.loss_scale, sums.model_state)
        after, metrics = update.conclude(state, after, verdict, leaf_squares, loss, weight, found["aux"], mask, self.policy)
        placed = [
            grad.total if isinstance(grad, Running) else jax.lax.with_sharding_constraint(grad, plan.layout.on_device[index])
            for grad, index in zip(sums.grads, plan.trained, strict=True)
        ]
        whole = NamedSharding(plan.layout.mesh, PartitionSpec())
        rest = jax.lax.with_sharding_constraint((scales, verdict.proceed, shared, early), whole)
        return after, (metrics, Carried(placed, *rest))


def _check_nothing_waits(plan: Update) -> None:
    """Gradients that leave as they appear are not there when an update asks for all gradients."""
    num_params, num_arrays, num_scalars = plan.num_outputs
    _, used = plan.split.first([*[False] * (num_params + num_arrays), *[True] * num_scalars])
    after_params = len(plan.split.consts) + num_params
    wanted = used[after_params : after_params + num_params]
    missing = [at for at, index in enumerate(plan.trained) if wanted[at] and index in plan.at_use]
    if not missing:
        return
    found = [plan.layout.placements[plan.trained[at]].leaf.path for at in missing[:10]]
    context = f"gradients of {len(missing)} parameters are in host memory when the optimizer wants to look at all of them"
    fix = "Clip by jzero.make_train_step(clip_norm=), not inside the optimizer; or leave fetch= out."
    problem = "with fetch='use' no update may wait for all gradients"
    raise NotImplementedError(explain("jzero.Offload", problem, found=found, context=context, fix=fix))


def gradient_step(step: TrainStep, plan: Update) -> GradientStep:
    return GradientStep(**{one.name: getattr(step, one.name) for one in fields(step)}, update=plan)


def _first(plan: Update, params: Sequence[Any], grads: Sequence[Any], shared: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The optimizer's scalars after the step, and the early values."""
    num_params, num_arrays, num_scalars = plan.num_outputs
    outputs = [*[False] * (num_params + num_arrays), *[True] * num_scalars]
    jaxpr, used = plan.split.first(outputs)
    trained = [params[index] for index in plan.trained]
    every = plan.inputs(trained, grads, [None] * num_arrays, shared)
    found = _compat.evaluate(jaxpr, [value for value, keep in zip(every, used, strict=True) if keep])
    return found[:num_scalars], found[num_scalars:]
