"""The engine for a `TrainStep`: its gradient with the data axes manual where that is exact, its update under Auto axes.

What each stage does with a sharded parameter is all there is to ZeRO, and stands in `Holding`: when it is gathered, what
is differentiated, and when its gradient is reduced.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jzero import _compat
from jzero import precision as precisions
from jzero._specs import axes as axes_of
from jzero._specs import entry_of, names, zero_axes
from jzero._tree import is_key
from jzero._types import ALSO_AXES
from jzero.comm import Auto, Comm, Manual
from jzero.engine import experts, fetching
from jzero.engine.layout import Layout, Options, Trace, check_effects, check_same_state
from jzero.engine.scalars import add_up
from jzero.gather import Fact, constraints_on, differentiable
from jzero.gather.away import NOTHING, Away
from jzero.gather.composed import Parts
from jzero.gather.facts import Reading, rooted
from jzero.mesh import axis_size, batch_axes
from jzero.rules.batch import is_split
from jzero.step import TrainStep, gradient
from jzero.step import batch as batches
from jzero.step import params as parameters
from jzero.step.gradient import Running
from jzero.step.normalise import Examples, Normaliser, normaliser
from jzero.step.train_step import microbatch_shapes
from jzero.step.update import squares


@dataclass(frozen=True)
class Holding:
    """How one program holds its parameters between the start of a step and their uses."""

    gather: str  # "never", "step" or "use"
    reduce: str  # "step" or "use"
    splits: tuple[tuple[Any, ...] | None, ...]  # per parameter leaf; None where it is whole anyway
    mask: tuple[bool, ...]  # which leaves train
    comm: Comm
    reading: Reading
    reduce_dtype: Any  # as gradients appear
    reduce_once_dtype: Any  # once a step
    compute_dtype: Any
    at_use: Mapping[int, tuple[int, ...]]  # parameters that rest away and come at their uses -> the loops that slice them
    num_micro: int

    def at_start(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The working copy: stages 1 and 2 gather it once."""
        once = self.gather == "step"
        return [
            self.comm.gather(leaf, split) if split and once else leaf for leaf, split in zip(leaves, self.splits, strict=True)
        ]

    def differentiated(self, leaves: Sequence[jax.Array], held: Sequence[jax.Array]) -> list[jax.Array]:
        """What the gradient is taken of: the working copy, or a stand-in of the shard's shape to reduce into."""

        def chosen(index: int, leaf: jax.Array, whole: jax.Array, split: Any) -> Any:
            if index in self.at_use:
                return Running(leaf, jnp.full(self.at_use[index], NOTHING))
            scattered_early = split and self.reduce == "use" and self.gather == "step"
            return jnp.zeros(leaf.shape, leaf.dtype) if scattered_early else whole

        every = [chosen(*item) for item in zip(range(len(leaves)), leaves, held, self.splits, strict=True)]
        return parameters.select(every, self.mask)

    def facts(self) -> tuple[Fact | None, ...]:
        """Which parameters enter the loss as something other than a whole array."""
        early = self.gather == "use" or self.reduce == "use"

        def fact(index: int, split: Any, trains: bool) -> Fact | None:
            return Fact(index, split) if split and early and (trains or self.gather == "use") else None

        return tuple(fact(*item) for item in zip(range(len(self.splits)), self.splits, self.mask, strict=True))

    def in_its_turn(self, held: Sequence[jax.Array], micro: Any) -> tuple[Sequence[jax.Array], Any]:
        """Tied together where microbatches follow each other: a gather that depends on none of them may be moved before all of
        them, and its parameter is whole for the whole step.
        """
        if self.gather != "use" or self.num_micro == 1:
            return held, micro
        is_shard = [fact is not None and fact.leaf not in self.at_use for fact in self.facts()]
        shards, micro = jax.lax.optimization_barrier((parameters.select(held, is_shard), micro))
        return parameters.merge(shards, held, is_shard), micro

    def arguments(self, held: Sequence[jax.Array], diff: Sequence[jax.Array]) -> list[Any]:
        """The loss's parameters: whole arrays, or `Parts` where there is a fact."""
        full = parameters.merge(diff, held, self.mask)
        rows = zip(full, held, self.facts(), strict=True)
        return [value if fact is None else self._parts(fact.leaf, value, leaf) for value, leaf, fact in rows]

    def _parts(self, index: int, value: Any, held: jax.Array) -> Parts:
        trains = self.mask[index]
        if index in self.at_use:
            total, squares = value if trains else (None, None)
            return Parts(away=Away(held, total, squares, self.compute_dtype, self.num_micro > 1, len(self.at_use[index])))
        sink = value if trains else None
        return Parts(shard=held, sink=sink) if self.gather == "use" else Parts(whole=held, sink=sink)

    def at_end(self, grads: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
        """Gradients reduced over ZeRO's axes: those that were not, once."""
        splits = parameters.select(self.splits, self.mask)
        return [
            grad if isinstance(grad, Running) else self._reduced_at_end(grad, split).astype(dtype)
            for grad, split in zip(grads, splits, strict=True)
        ]

    def _reduced_at_end(self, grad: jax.Array, split: Any) -> jax.Array:
        return self.comm.reduce(grad, split, self.reduce_once_dtype) if split and self.reduce == "step" else grad


def build(step: TrainStep, layout: Layout, options: Options, traces: list[Trace]) -> Callable[..., Any]:
    """The step for a mesh, to be jitted under the layout's shardings. What it finds out on the way goes to `traces`."""

    def sharded(state: Any, *batch: Any) -> tuple[Any, Any]:
        batch = jax.tree.map(jnp.asarray, batch)
        batches.check(batch, step.accumulate)
        gradients = Gradients(step, layout, options, state, batch)
        state_out, metrics = gradients.finish()
        traces[:] = [gradients.trace]
        check_same_state(state, state_out)
        return state_out, metrics

    return sharded


def at_use(step: TrainStep, layout: Layout, options: Options, batch: Any) -> frozenset[int]:
    """The numbers of the parameters that come at their uses, found without making a program."""
    found: list[frozenset[int]] = []

    def look(state: Any, batch: Any) -> None:
        found.append(Gradients(step, layout, options, state, batch).trace.at_use)

    jax.eval_shape(look, jax.tree.unflatten(layout.treedef, layout.avals), batch)
    return found[0]


class Gradients:
    """One traced step: from the state and the batch to summed gradients, shard by shard or under their global meaning."""

    def __init__(self, step: TrainStep, layout: Layout, options: Options, state: Any, batch: Any):
        self.step, self.layout, self.options, self.state, self.batch = step, layout, options, state, batch
        self.mesh = options.mesh
        self.batch_axes = batch_axes(self.mesh)
        self.manual_axes: tuple[str, ...] = self.batch_axes
        self.num_shards = axis_size(self.mesh, self.batch_axes)
        compute = jax.eval_shape(lambda params: precisions.cast(params, step.policy.compute), state.params)
        avals, self.treedef = jax.tree.flatten(compute)
        self.avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in avals]
        self.mask = parameters.trainable_mask(state.params, step.trainable)
        self.key = step.step_key(state)
        self.examples = self._examine()
        self.whole = experts.used_whole(self.examples.program, layout, len(self.avals), self.mesh, self.batch_axes)
        can_be_local = step.reduction == "local" or (step.reduction == "auto" and self.examples.kind != "mixed")
        self.manual = can_be_local and not self.whole
        self.at_use, told = self._coming()
        here = jax.tree.leaves(layout.fetched(state, leaving=self.at_use).params)
        self.leaves = [
            leaf if index in self.at_use else precisions.cast(leaf, step.policy.compute) for index, leaf in enumerate(here)
        ]
        self.trace = Trace(self.manual, [*self._findings(), *told], at_use=frozenset(self.at_use))

    def _examine(self) -> Examples:
        shards = self.num_shards if self.step.reduction != "global" else 1
        num_parts = self.step.accumulate * shards
        micro = microbatch_shapes(self.batch, num_parts)
        return self.step.examples(self._params(self.avals), micro, self.key, self.state.model_state, num_parts=num_parts)

    @property
    def by_shard(self) -> bool:
        """Whether each shard computes its own sums; a single shard is the whole batch."""
        return self.manual and self.num_shards > 1

    def _coming(self) -> tuple[dict[int, tuple[int, ...]], list[str]]:
        """Which parameters come at their uses, with the loops that slice them, and what to tell of it."""
        if not fetching.is_asked(self.options):
            return {}, []
        comm = self._by_hand() if self.by_shard else self._auto()
        micro = microbatch_shapes(self.batch, self.step.accumulate)
        program = self.step.trace(self._params(self.avals), micro, self.key, self.state.model_state)
        reading = self._holding(comm, {}).reading
        is_apart = lambda index: self.by_shard and bool(self._missing(self.layout.split(index)))
        return fetching.at_use(self.layout, self.options, self.mask, reading, program.jaxpr, is_apart)

    def _findings(self) -> list[str]:
        """What the analysis of the loss found, and what is done about it."""
        by_shard = "is the mean of the shards' own, as reduction='local' asks, although"
        done = by_shard if self.manual else "stays global, reduced in every microbatch, because"
        found = [*self.examples.notes]
        found += [f"{what} {done} examples meet before the final mean: {where}" for what, where in self.examples.meetings]
        found += [f"gradients stay global, reduced in every microbatch, because {line}" for line in self.whole]
        if self.manual and self.examples.program is not None:
            lost = constraints_on(self.examples.program, self.batch_axes)
            found += [f"constraint dropped, since there each shard computes its own rows: {where}" for where in lost]
        return found

    def _params(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)

    def _splits(self, comm: Comm, at_use: Collection[int] = ()) -> tuple[Any, ...]:
        """Per parameter: its spec where ZeRO splits it. Where ZeRO's axes are manual, a dim over them and more is over them."""

        def split(index: int) -> Any:
            entries = self.layout.split(index)
            is_zero = any(zero_axes(entry) or set(ALSO_AXES) & set(names(entry)) for entry in entries)
            if index not in at_use and (not is_zero or self.options.stage.gather == "never"):
                return None
            return tuple(map(self._by_hand_or_elsewhere, entries)) if comm.is_local else entries

        return tuple(split(index) for index in range(len(self.avals)))  # params come first in a TrainState

    def _by_hand_or_elsewhere(self, entry: Any) -> Any:
        """ZeRO's manual axes, alone or before its others; else how the partitioner splits what is left."""
        here, by_hand = names(entry), zero_axes(entry)
        if by_hand:
            is_plain = here[: len(by_hand)] == by_hand and set(here[len(by_hand) :]) <= set(ALSO_AXES)
            return entry_of(here if is_plain else by_hand)
        return entry_of(tuple(name for name in here if name not in self.manual_axes))

    def _over_batch_axes(self, index: int) -> tuple[Any, ...]:
        """A parameter's spec as a shard sees it: of the manual axes those that examples are split over."""
        mine = [tuple(name for name in names(entry) if name in self.batch_axes) for entry in self.layout.split(index)]
        return tuple(map(entry_of, mine))

    def _seen_whole(self, index: int, comm: Comm) -> jax.ShapeDtypeStruct:
        """A parameter as the loss sees it: whole, but in one shard's program without the experts that live elsewhere."""
        leaf = self.avals[index]
        if not comm.is_local:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        counts = (axis_size(self.mesh, experts.apart(entry, self.batch_axes)) for entry in self.layout.split(index))
        shape = tuple(size // count for size, count in zip(leaf.shape, counts, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def _holding(self, comm: Comm, at_use: Mapping[int, tuple[int, ...]]) -> Holding:
        stage, policy = self.options.stage, self.step.policy
        reading = Reading(False, dict(self.mesh.shape), frozenset(self.batch_axes) if comm.is_local else None)
        return Holding(
            stage.gather,
            stage.reduce,
            self._splits(comm, at_use),
            self.mask,
            comm,
            reading,
            policy.reduce,
            policy.reduce_once,
            policy.compute,
            at_use,
            self.step.accumulate,
        )

    def finish(self) -> tuple[Any, Any]:
        """Summed gradients, then the update under Auto axes."""
        sums, leaf_squares, weight, program = self._by_shard() if self.by_shard else self._globally()
        scale = self.state.loss_scale.scale
        factor = weight.gradient_factor(sums.weight, scale)
        total = weight.total(sums.weight)
        return self.step.finish(self.state, factor, leaf_squares * factor**2, sums, total, program, self.mask)

    def _sums(
        self, leaves: Sequence[jax.Array], batch: Any, model_state: Any, rngs: Any, scale: jax.Array, comm: Comm,
        num_shards: int,
    ) -> tuple[gradient.Sums, Normaliser, gradient.LossProgram]:  # fmt: skip
        """The gradient of a batch or of one shard of it, with parameters held as the stage says."""
        step, holding = self.step, self._holding(comm, self.at_use)
        micro = microbatch_shapes(batch, step.accumulate)
        whole = [self._seen_whole(index, comm) for index in range(len(self.avals))]
        program = step.trace(self._params(whole), micro, rngs(0), model_state)
        check_effects(program.jaxpr, self.options)
        weight = normaliser(
            program, self.examples, batch, num_micro=step.accumulate, num_shards=num_shards, rngs=rngs, model_state=model_state,
            add_up=self._over_shards if comm.is_local else (lambda value: value),
        )  # fmt: skip
        held = holding.at_start(leaves)
        others = len(gradient.arguments([], micro, rngs(0), model_state))
        facts = rooted((*holding.facts(), *(None,) * others))
        self.trace.jaxpr, self.trace.facts, self.trace.reading = program.jaxpr, facts, holding.reading

        def run_loss(diff: Sequence[Any], micro: Any, rng: Any, model_state: Any) -> Any:
            here, micro = holding.in_its_turn(held, micro)
            flat = gradient.arguments(holding.arguments(here, diff), micro, rng, model_state)
            out = differentiable(
                program.jaxpr, facts, flat, reading=holding.reading, comm=comm, reduce_dtype=holding.reduce_dtype
            )
            return gradient.unflatten(program, out)

        sums = gradient.accumulate(
            program, run_loss, holding.differentiated(leaves, held), batch, num=step.accumulate, rngs=rngs,
            model_state=model_state, seed=scale / weight.before, dtype=step.policy.accumulate,
        )  # fmt: skip
        return sums._replace(grads=holding.at_end(sums.grads, step.policy.accumulate)), weight, program

    def _over_shards(self, value: jax.Array) -> jax.Array:
        return jax.lax.psum(value, self.batch_axes)

    def _globally(self) -> tuple[gradient.Sums, jax.Array, Normaliser, gradient.LossProgram]:
        """Every value is the whole batch's: exact for any loss, at the cost of a reduction in every microbatch."""
        rngs = partial(self.step.microbatch_key, self.key, shard=0)
        scale = self.state.loss_scale.scale
        with _compat.mesh_shown(self.mesh):
            sums, weight, program = self._sums(self.leaves, self.batch, self.state.model_state, rngs, scale, self._auto(), 1)
        return sums._replace(grads=_left(sums.grads)), squares(sums.grads), weight, program

    def _auto(self) -> Auto:
        return Auto(self.mesh, also=ALSO_AXES)

    def _by_shard(self) -> tuple[gradient.Sums, jax.Array, Normaliser, gradient.LossProgram]:
        """Every shard computes its own examples' sums, with the batch axes manual; then they are added up."""
        comm, traced = self._by_hand(), []
        splits = self._splits(comm, self.at_use)
        specs = [PartitionSpec(*self._over_batch_axes(index)) for index in range(len(splits))]
        whole, by_row = PartitionSpec(), PartitionSpec(self.batch_axes)

        def local(leaves: Any, batch: Any, model_state: Any, key: jax.Array, scale: jax.Array, shard: jax.Array) -> Any:
            rngs = partial(self.step.microbatch_key, key, shard=shard[0])
            with _compat.constraints_apart_from(self.batch_axes):
                sums, weight, program = self._sums(leaves, batch, model_state, rngs, scale, comm, self.num_shards)
            traced[:] = [weight.exact, program]
            return self._added_up(sums, parameters.select(specs, self.mask)), weight.before

        batch_specs = jax.tree.map(lambda leaf: by_row if is_split(leaf) else whole, self.batch)
        grads_specs = [
            Running(spec, None) if index in self.at_use else spec for index, spec in enumerate(specs) if self.mask[index]
        ]
        sums_specs: Any = gradient.Sums(*_any(grads_specs, whole, whole, gradient.AuxParts(*_any(whole, whole, by_row)), whole))
        run = jax.shard_map(
            local, mesh=self.mesh, in_specs=(specs, batch_specs, whole, whole, whole, by_row),
            out_specs=((sums_specs, whole), whole), axis_names=frozenset(self.batch_axes), check_vma=False,
        )  # fmt: skip
        shards, scale = jnp.arange(self.num_shards), self.state.loss_scale.scale
        (sums, leaf_squares), before = run(self.leaves, self.batch, self.state.model_state, self.key, scale, shards)
        return sums, leaf_squares, Normaliser(before, traced[0]), traced[1]

    def _added_up(self, sums: gradient.Sums, specs: Sequence[Any]) -> tuple[gradient.Sums, jax.Array]:
        """What shards still hold apart, in two collectives: leaves over the axes that split them not, then all scalars."""
        grads = [
            grad if isinstance(grad, Running) else self._across(grad, self._missing(spec))
            for grad, spec in zip(sums.grads, specs, strict=True)
        ]
        copies = jnp.array([axis_size(self.mesh, self._missing(spec)) for spec in specs], jnp.float32)
        parts = (sums.loss, sums.weight, sums.aux.averaged, sums.aux.summed, squares(grads) / copies)
        self.trace.num_scalars = sum(leaf.size for leaf in jax.tree.leaves(parts))
        loss, weight, averaged, summed, leaf_squares = add_up(parts, self.batch_axes)
        aux = sums.aux._replace(averaged=averaged, summed=summed)
        model_state = sums.model_state if self.examples.kind != "mixed" else self._averaged(sums.model_state)
        return gradient.Sums(_left(grads), loss, weight, aux, model_state), leaf_squares

    def _missing(self, spec: Any) -> tuple[str, ...]:
        """The batch axes over which a gradient with this spec is still to be added up: those whose shards hold all of it."""
        return tuple(axis for axis in self.batch_axes if axis not in axes_of(spec))

    def _across(self, grad: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """One all-reduce of a leaf that is whole; of a shard, only over replicas."""
        dtype = self._by_hand().sum_dtype(self.step.policy.reduce_once)
        return jax.lax.psum(grad.astype(dtype), axes).astype(grad.dtype) if axes else grad

    def _by_hand(self) -> Manual:
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return Manual(widens=is_cpu and len(self.mesh.axis_names) > len(self.manual_axes), also=ALSO_AXES)

    def _averaged(self, model_state: Any) -> Any:
        """`reduction="local"` lets shards' model states differ; their mean is what all go on with."""

        def mean(leaf: jax.Array) -> jax.Array:
            is_real = not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
            return jax.lax.pmean(leaf, self.batch_axes) if is_real else leaf

        return jax.tree.map(mean, model_state)


def _left(grads: Sequence[Any]) -> list[Any]:
    """Gradients whose squares have been added up."""
    return [grad._replace(squares=None) if isinstance(grad, Running) else grad for grad in grads]


def _any(*specs: Any) -> tuple[Any, ...]:
    """Specs where a type says arrays: a pytree of specs has the structure of what it describes."""
    return specs
