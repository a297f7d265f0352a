"""The engine for a `TrainStep` of a `jzero.Pipeline`: batch axes and `pipe` manual, layers where their pipe stage is.

The same sums as the composed engine's, so that everything from the gradient's norm on is shared. What ZeRO does is the same
too: stages 1 and 2 gather a device's own layers once a step, stage 2 reduces each layer's gradient as it appears, stage 3
gathers one layer at a time inside the table. Only where those collectives stand differs (`pipeline/executor.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jzero import _compat
from jzero._errors import explain
from jzero.engine import pipeline_costs
from jzero.engine.composed import Gradients
from jzero.engine.layout import Layout, Options, Trace, check_effects, check_same_state
from jzero.engine.over_data import OverData
from jzero.engine.scalars import add_up
from jzero.engine.stage_layers import stacked_layers, stage_layers
from jzero.mesh import axis_size, describe
from jzero.pipeline import executor, slots
from jzero.pipeline.backward import LayerPrograms
from jzero.pipeline.ends import Ends, HeadSums
from jzero.pipeline.model import Pipeline, is_list
from jzero.pipeline.schedule import Schedule
from jzero.pipeline.schedules import forward_only
from jzero.rules.batch import is_split
from jzero.step import TrainStep, gradient
from jzero.step import batch as batches
from jzero.step import params as parameters
from jzero.step.normalise import Normaliser, normaliser
from jzero.step.train_step import microbatch_shapes
from jzero.step.update import squares

PIPE = "pipe"
WHO = "jzero.shard"


def build(step: TrainStep, layout: Layout, options: Options, traces: list[Trace]) -> Callable[..., Any]:
    """The step for a mesh with an axis `pipe`, to be jitted under the layout's shardings."""

    def sharded(state: Any, *batch: Any) -> tuple[Any, Any]:
        assert options.schedule is not None
        batch = jax.tree.map(jnp.asarray, batch)
        batches.check(batch, step.accumulate)
        gradients = PipelineGradients(step, layout, options, state, batch, options.schedule)
        state_out, metrics = gradients.finish()
        traces[:] = [gradients.trace]
        check_same_state(state, state_out)
        return state_out, metrics

    return sharded


def build_evaluation(step: TrainStep, layout: Layout, options: Options) -> Callable[..., Any]:
    """The forward passes of the step's schedule: `(state, *batch) -> metrics`."""

    def sharded(state: Any, *batch: Any) -> dict[str, Any]:
        assert options.schedule is not None
        batch = jax.tree.map(jnp.asarray, batch)
        batches.check(batch, step.accumulate)
        return PipelineGradients(step, layout, options, state, batch, forward_only(options.schedule)).evaluate()

    return sharded


class PipelineGradients(Gradients):
    """One traced step of a pipeline, or with a schedule of forward passes alone its evaluation."""

    def __init__(self, step: TrainStep, layout: Layout, options: Options, state: Any, batch: Any, schedule: Schedule):
        assert isinstance(step.loss_fn, Pipeline)
        self.model, self.schedule = step.loss_fn, schedule
        self.slots = slots.assign(self.schedule)
        self.stages = stage_layers(self.model, state.params, self.schedule, who=WHO)
        self.num_pipe_stages = self.schedule.num_pipe_stages
        super().__init__(step, layout, options, state, batch)
        self.manual_axes = (*self.batch_axes, PIPE)
        self._check_meaning()
        self.manual = self.trace.manual = True
        if schedule.only_forward:
            self.mask = (False,) * len(self.leaves)
        names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(self._params(self.leaves))]
        self.layer_leaves = [index for index, name in enumerate(names) if name == "layers"]
        self.outer_leaves = [index for index, name in enumerate(names) if name != "layers"]
        self.is_stacked = stacked_layers(state.params, len(names))[self.layer_leaves[0]] == 0
        params, micro = self._shapes(microbatch_shapes(batch, step.accumulate * self.num_shards))
        self.x = jax.eval_shape(self.model.start, params, *micro)

    def evaluate(self) -> dict[str, Any]:
        sums, _, weight, program = self._by_shard()
        return self.step.evaluation(sums, weight.total(sums.weight), program)

    def _shapes(self, micro: Any) -> tuple[Any, Any]:
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.tree.map(shape, self._params(self.leaves)), micro

    def _check_meaning(self) -> None:
        """Shards of a pipeline compute on their own: a loss in which their examples meet has no such program."""
        self._check_statistics()
        reduction = self.step.reduction
        if self.num_shards == 1 or reduction == "local" or (reduction == "auto" and self.examples.kind != "mixed"):
            return
        found = [f"{what}: examples meet before the final mean: {where}" for what, where in self.examples.meetings]
        context = f"mesh {describe(self.mesh)}; reduction={reduction!r}"
        fix = "Return jzero.weighted(sum, weight), accept means of shards with reduction='local', or use a mesh with data=1."
        problem = "a pipeline cannot keep the global meaning of this loss on several shards of the batch"
        raise ValueError(explain(WHO, problem, found=found, context=context, fix=fix))

    def _check_statistics(self) -> None:
        """A mean over all shards is a collective, and pipe stages are not at the same operation at the same time."""
        program = self.examples.program
        if program is not None and self.num_shards > 1 and _contains(program, "jzero_over_batch_mean"):
            found, fix = ["jzero.over_batch_mean in embed, layers or head"], "Use a mesh with data=1 beside pipe, or no pipe."
            context = f"mesh {describe(self.mesh)}"
            problem = "a pipeline has no means over the whole batch (routers of experts need them) on several shards"
            raise NotImplementedError(explain(WHO, problem, found=found, context=context, fix=fix))

    def _by_shard(self) -> tuple[gradient.Sums, jax.Array, Normaliser, gradient.LossProgram]:
        """Every shard of the batch runs its microbatches through the pipeline; then shards and pipe stages are added up."""
        traced: list[Any] = []
        whole, by_row, by_stage = PartitionSpec(), PartitionSpec(self.batch_axes), PartitionSpec(PIPE)
        specs = [self._rest(index) for index in range(len(self.leaves))]

        def local(leaves: Any, batch: Any, key: Any, scale: Any, shard: Any, cells: Any, rows: Any, counts: Any) -> Any:
            rngs = partial(self.step.microbatch_key, key, shard=shard[0])
            with _compat.constraints_apart_from((*self.batch_axes, PIPE)):
                program, weight = self._normalised(batch, rngs)
                sums = self._run(leaves, batch, program, scale / weight.before, cells[:, 0], rows[0], counts[0])
                traced[:] = [weight.exact, program]
                return self._added(*sums, rows[0]), weight.before

        batch_specs = jax.tree.map(lambda leaf: by_row if is_split(leaf) else whole, self.batch)
        grads_specs = parameters.select(specs, self.mask)
        sums_specs: Any = gradient.Sums(*_any(grads_specs, whole, whole, gradient.AuxParts(*_any(whole, whole, by_row)), whole))
        run = jax.shard_map(
            local, mesh=self.mesh,
            in_specs=(specs, batch_specs, whole, whole, by_row, PartitionSpec(None, PIPE), by_stage, by_stage),
            out_specs=((sums_specs, whole), whole), axis_names=frozenset((*self.batch_axes, PIPE)), check_vma=False,
        )  # fmt: skip
        tables = executor.columns(self.slots), self.stages.rows(), self.stages.chunk_counts()
        shards, scale = jnp.arange(self.num_shards), self.state.loss_scale.scale
        (sums, leaf_squares), before = run(self.leaves, self.batch, self.key, scale, shards, *map(jnp.asarray, tables))
        return sums, leaf_squares, Normaliser(before, traced[0]), traced[1]

    def _rest(self, index: int) -> PartitionSpec:
        """A leaf's spec, the manual axes alone."""
        named = lambda entry: entry if isinstance(entry, tuple) else (entry,)
        kept = [tuple(name for name in named(entry) if name in self.manual_axes) for entry in self.layout.split(index)]
        is_zero = self.options.stage.gather != "never"
        return PartitionSpec(*(tuple(name for name in entry if name == PIPE or is_zero) or None for entry in kept))

    def _pipe_dim(self, index: int) -> int | None:
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in self.layout.split(index)]
        return next((dim for dim, entry in enumerate(entries) if PIPE in entry), None)

    def _normalised(self, batch: Any, rngs: Any) -> tuple[gradient.LossProgram, Normaliser]:
        """The sequential loss of one microbatch, traced for its weight and the kinds of its aux."""
        step, state = self.step, self.state
        whole, micro = self._shapes(microbatch_shapes(batch, step.accumulate))
        program = step.trace(whole, micro, rngs(0), state.model_state)
        check_effects(program.jaxpr, self.options)
        weight = normaliser(
            program, self.examples, batch, num_micro=step.accumulate, num_shards=self.num_shards, rngs=rngs,
            model_state=state.model_state, add_up=self._over_shards,
        )  # fmt: skip
        return program, weight

    def _run(
        self, leaves: Sequence[Any], batch: Any, program: Any, seed: Any, cells: Any, rows: Any, counts: Any
    ) -> tuple[list[Any], HeadSums]:
        """From leaves at rest to one gradient per trained leaf, in the order that the schedule ran them."""
        stage, comm = self.options.stage, self._by_hand()
        splits = self._splits(comm)
        own = list(leaves)
        for index in self.layer_leaves if self.is_stacked else ():
            own[index] = self.stages.take(own[index], rows, self._pipe_dim(index))
        if stage.gather == "step":
            own = [comm.gather(leaf, split) if split else leaf for leaf, split in zip(own, splits, strict=True)]
        job = self._job(program, seed, splits)
        self.job = job
        counts = counts if self.is_stacked else jnp.ones_like(counts)
        layers, outer = ([own[index] for index in part] for part in (self.layer_leaves, self.outer_leaves))
        layer_grads, outer_grads, sums = executor.run(job, cells, counts, layers, outer, batch, self.step.accumulate)
        found = dict(zip(self._trained(self.layer_leaves), layer_grads, strict=True))
        found |= dict(zip(self._trained(self.outer_leaves), outer_grads, strict=True))
        return [found[index] for index, trains in enumerate(self.mask) if trains], sums

    def _trained(self, part: Sequence[int]) -> list[int]:
        return [index for index in part if self.mask[index]]

    def _job(self, program: gradient.LossProgram, seed: Any, splits: Sequence[Any]) -> executor.Job:
        stage, policy = self.options.stage, self.step.policy
        layer_dim = 1 if self.is_stacked else 0
        shift = lambda split: split[layer_dim:] if split else None
        part_splits = {
            "layer": [shift(splits[index]) for index in self.layer_leaves],
            "outer": [splits[index] for index in self.outer_leaves],
        }
        sharing = OverData(stage.gather == "use", stage.reduce == "use", part_splits, self._by_hand(), policy.reduce)
        params = self._params(self.leaves)
        outer = {name: part for name, part in params.items() if name != "layers"}
        mask = lambda part: [self.mask[index] for index in part]
        ends = Ends(self.model, outer, mask(self.outer_leaves), self.x, has_aux=self.step.call.has_aux, kinds=program.aux.kinds)
        positions = lambda part: [position for position, yes in enumerate(mask(part)) if yes]
        return executor.Job(
            self.slots, self._layer(params["layers"], mask(self.layer_leaves)), ends, sharing,
            self.stages.largest if self.is_stacked else 1, self.is_stacked, positions(self.layer_leaves),
            positions(self.outer_leaves), policy.accumulate, seed, not self.schedule.only_forward,
        )  # fmt: skip

    def _layer(self, layers: Any, mask: list[bool]) -> LayerPrograms:
        """The programs of one layer; of a list, of a whole stage, which number it is being the last parameter."""
        x, x_treedef = jax.tree.flatten(self.x)
        leaves, treedef = jax.tree.flatten(layers)
        if self.is_stacked:
            shapes = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
            layer = self._under_policy(self.model.functions(1)[0])

            def run(params: list[Any], x: list[Any]) -> list[Any]:
                return jax.tree.leaves(layer(jax.tree.unflatten(treedef, params), jax.tree.unflatten(x_treedef, x)))

            return LayerPrograms(run, shapes, mask, x)
        assert is_list(layers)
        functions = [self._under_policy(fn) for fn in self.model.functions(len(layers))]
        starts = [sum(self.stages.counts[:virtual]) for virtual in range(len(self.stages.counts))]

        def stage(first: int, count: int, params: Any, x: Any) -> Any:
            for index in range(first, first + count):
                x = functions[index](params[index], x)
            return x

        def run_stage(params: list[Any], x: list[Any]) -> list[Any]:
            own, tree = jax.tree.unflatten(treedef, params[:-1]), jax.tree.unflatten(x_treedef, x)
            branches = [partial(stage, first, count) for first, count in zip(starts, self.stages.counts, strict=True)]
            return jax.tree.leaves(jax.lax.switch(params[-1], branches, own, tree))

        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        return LayerPrograms(run_stage, [*shapes, jax.ShapeDtypeStruct((), jnp.int32)], [*mask, False], x)

    def _under_policy(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        policy = self.options.remat
        return layer if policy in (None, "none") else jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def _added(self, grads: Sequence[Any], sums: HeadSums, rows: Any) -> tuple[gradient.Sums, jax.Array]:
        """What shards and pipe stages hold apart: each leaf reduced over data, then over pipe, then over replicas."""
        policy, splits = self.step.policy, self._splits(self._by_hand())
        trained = [index for index, trains in enumerate(self.mask) if trains]
        done = [self._added_leaf(grad, index, splits[index], rows) for grad, index in zip(grads, trained, strict=True)]
        everywhere = (*self.batch_axes, PIPE)
        copies = jnp.array([self._num_copies(index) for index in trained], jnp.float32)
        parts = (sums.loss, sums.weight, sums.averaged, sums.summed, squares(done) / copies if done else None)
        self._note_costs(sum(leaf.size for leaf in jax.tree.leaves(parts)))
        loss, weight, averaged, summed, leaf_squares = add_up(parts, everywhere)
        batched = [batches.join(jax.lax.psum(leaf, PIPE)) for leaf in sums.batched]
        aux = gradient.AuxParts(averaged, summed, batched)
        grads = [grad.astype(policy.accumulate) for grad in done]
        return gradient.Sums(grads, loss, weight, aux, self.state.model_state), leaf_squares

    def _note_costs(self, num_scalars: int) -> None:
        """For the report: what the pipeline costs, and what it should move."""
        splits = self._splits(self._by_hand())
        names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(self._params(self.leaves))]
        sizes = [self.layout.num_elements(index, apart=(PIPE,)) for index in range(len(self.leaves))]
        dims = [self._pipe_dim(index) for index in range(len(names))]
        rows = zip(sizes, names, map(bool, splits), self.mask, dims, strict=True)
        axes = {name: self.mesh.shape[name] for name in self.mesh.axis_names if name in (*self.batch_axes, PIPE)}
        job = self.job
        plan = pipeline_costs.Plan(
            self.schedule, self.slots, self.stages, self.is_stacked, sum(self.stages.counts),
            [pipeline_costs.Part(*row) for row in rows], jax.tree.leaves(self.x), job.layer.saved, job.layer.kept,
            self.options.stage, self.step.policy, axes, num_scalars, pipeline_costs.busy_ticks(self.slots),
        )  # fmt: skip
        self.trace.num_scalars, self.trace.formula = num_scalars, pipeline_costs.wire(plan)
        self.trace.pipeline = pipeline_costs.summary(plan)
        self.trace.findings += pipeline_costs.findings(self.trace.pipeline, plan)

    def _added_leaf(self, grad: jax.Array, index: int, split: Any, rows: Any) -> jax.Array:
        if split and self.options.stage.reduce == "step":
            grad = self._by_hand().reduce(grad, split, self.step.policy.reduce_once).astype(grad.dtype)
        if self.is_stacked and index in self.layer_leaves:
            grad = self.stages.give_back(grad, rows, self._pipe_dim(index))
        else:
            grad = jax.lax.psum(grad, PIPE)
        return self._across(grad, self._missing(self._rest(index)))

    def _num_copies(self, index: int) -> int:
        """How many devices hold the same elements of a gradient."""
        over_pipe = 1 if self._pipe_dim(index) is not None else self.num_pipe_stages
        return axis_size(self.mesh, self._missing(self._rest(index))) * over_pipe


def _contains(program: Any, name: str) -> bool:
    eqns = _compat.open_jaxpr(program)[0].eqns
    return any(eqn.primitive.name == name or any(_contains(inner, name) for inner in _compat.inner_jaxprs(eqn)) for eqn in eqns)


def _any(*specs: Any) -> tuple[Any, ...]:
    """Specs where a type says arrays: a pytree of specs has the structure of what it describes."""
    return specs
