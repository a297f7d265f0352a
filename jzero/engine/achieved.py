"""Whether the compiled step is what its stage promises. Every fault names the leaves or the lines of code that it is about.

Only what a stage promises is a fault; what costs more than expected without breaking a promise is a finding of the report.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jzero import _compat, audit, hlo, traffic
from jzero._errors import StageNotAchieved, columns, explain
from jzero._tree import short
from jzero._types import ALSO_AXES
from jzero.engine import memory
from jzero.engine.layout import Layout, Options, Trace
from jzero.gather.facts import Use, kept_use
from jzero.mesh import batch_axes, describe
from jzero.step import TrainStep

# Of the formula's bytes: what the traffic law allows (DESIGN 6), so shuffles below it are no fault.
ALLOWED_SHARE = 0.05
SMALL_BYTES = 4096  # per step: shuffles that cost a latency and no bandwidth, as of a few scalars
# In-loop reductions add up to the parameters once if a loop runs over layers, to twice or more if it runs over microbatches.
REPEATED = 1.5
# A user may ask for these by name; the partitioner's own shuffles carry the name of another operation.
ASKED_FOR = ("all_to_all", "ppermute", "pswapaxes", "ragged_all_to_all")
MOST_ROWS = 10


class Fault(NamedTuple):
    """One promise that the program breaks."""

    problem: str
    found: tuple[str, ...]
    fix: str


class Subject(NamedTuple):
    """A compiled step and everything that is known of it."""

    fn: Any
    layout: Layout
    options: Options
    trace: Trace
    compiled: Any
    measured: audit.Audit
    formula: traffic.Table
    uses: list[Use]  # of parameters, in the program's order

    @property
    def is_composed(self) -> bool:
        return isinstance(self.fn, TrainStep)

    @property
    def platform(self) -> str:
        return self.options.mesh.devices.flat[0].platform

    def over_batch(self, *kinds: str) -> list[hlo.Collective]:
        """Collectives of these kinds, as meant, between devices that differ in their data."""
        axes = set(batch_axes(self.options.mesh))
        names = lambda one: set(hlo.axis_of(one.groups, self.options.mesh).split("+"))
        found = [one for one in self.measured.collectives if audit.meaning(one) in kinds and hlo.group_size(one.groups) > 1]
        return [one for one in found if names(one) & axes]

    def describe(self, one: hlo.Collective) -> str:
        return audit.describe(one, self.options.mesh)


def faults(subject: Subject) -> list[Fault]:
    """Every promise of the stage that the compiled program breaks."""
    checks = [_rests_elsewhere, _not_donated, _saved_on_the_device]
    if subject.options.mesh.size > 1:
        checks += [_gathered_outside_its_use, _kept_whole, _reduced_in_a_loop, _gathered_wide, _shuffled]
    return [fault for check in checks for fault in check(subject)]


def _saved_on_the_device(subject: Subject) -> Iterator[Fault]:
    """Activations that were to be saved in host memory are there, as far as the compiler shows it."""
    if not subject.options.saves_on_host or not memory.shows_host(subject.options.mesh):
        return
    if not memory.bytes_saved_on_host(subject.compiled, subject.measured.module):
        yield Fault(
            "nothing is saved in host memory",
            ("the compiled program has no array in host memory beside its arguments",),
            "Name what the layers save: checkpoint_name(x, 'hidden') in the layer, and remat='offload:hidden'.",
        )


def error(found: list[Fault], options: Options, who: str) -> StageNotAchieved:
    """All faults in one message."""
    first = found[0]
    problem = f"stage {options.stage.number} was not achieved: {first.problem}"
    rows = list(first.found)
    for other in found[1:]:
        rows += [f"and {other.problem}", *other.found]
    fixes = " ".join(dict.fromkeys(fault.fix for fault in found))
    context = f"mesh {describe(options.mesh)}; stage {options.stage.number}"
    fix = f"{fixes} Or pass strict=False to go on with what the compiler made."
    return StageNotAchieved(explain(who, problem, found=rows, context=context, fix=fix))


def lines(found: list[Fault]) -> list[str]:
    """The faults as findings of a report."""
    return [f"not achieved: {fault.problem}: {line}" for fault in found for line in fault.found]


def _rests_elsewhere(subject: Subject) -> Iterator[Fault]:
    """What the compiler keeps of the state between steps lies where the stage wants it, leaf by leaf, in and out."""
    layout, compiled = subject.layout, subject.compiled
    given, returned = map(jax.tree.leaves, (compiled.input_shardings[0][0], compiled.output_shardings[0]))
    returned = [*given[: subject.trace.kept], *returned]
    rows, every = [], zip(layout.placements, layout.avals, layout.shardings, given, returned, strict=True)
    for placement, aval, want, *met in every:
        wrong = [where for where in met if not where.is_equivalent_to(want, len(aval.shape))]
        rows += [[placement.leaf.path, short(aval), place(where), f"asked for {place(want)}"] for where in wrong[:1]]
    if rows:
        yield Fault(
            f"{len(rows)} of {len(layout.avals)} leaves rest elsewhere",
            tuple(columns(rows[: 2 * MOST_ROWS])),
            "Constrain them inside the step.",
        )


def _not_donated(subject: Subject) -> Iterator[Fault]:
    """Every state leaf's memory is given to the new state."""
    if not subject.options.donate or subject.trace.kept:
        return
    num_leaves, parameters = len(subject.layout.avals), subject.measured.parameters
    num_batch = len(jax.tree.leaves(subject.compiled.input_shardings[0])) - num_leaves
    first = len(parameters) - num_leaves - num_batch  # constants that jax passes along come before the arguments
    if first < 0:
        return
    own = parameters[first : first + num_leaves]
    kept = [
        f"{placement.leaf.path}   {short(aval)}   {parameter.bytes:,} bytes on each device"
        for placement, aval, parameter in zip(subject.layout.placements, subject.layout.avals, own, strict=True)
        if not parameter.aliased and parameter.bytes
    ]
    if kept:
        yield Fault(
            f"{len(kept)} state leaves are not donated",
            tuple(kept[:MOST_ROWS]),
            "Give every leaf back with the shape, dtype and place it came with.",
        )


def _gathered_outside_its_use(subject: Subject) -> Iterator[Fault]:
    """Stage 3: no parameter is whole but where it is used, so no stack of layers is whole at all."""
    if subject.options.stage.gather != "use":
        return
    uses = subject.uses
    stacks = _stacks(subject)
    rows = [
        f"{subject.layout.placements[use.leaf].leaf.path}   replicated by the constraint at {_compat.where(use.eqn)}"
        for use in uses
        if use.eqn.primitive.name == "sharding_constraint" and not use.level and _names_no_axis(use.eqn)
    ]
    for one in subject.over_batch("all-gather"):
        hoisted = [stacks[array.elements] for array in one.arrays if array.elements in stacks]
        rows += [f"{path}   all its layers at once: {subject.describe(one)}" for path in hoisted if not one.loop_depth]
    if rows:
        yield Fault(
            "parameters are gathered outside their use",
            tuple(dict.fromkeys(rows[:MOST_ROWS])),
            "Leave parameters as they come until a layer uses them.",
        )


def _stacks(subject: Subject) -> dict[int, str]:
    """Elements of each stack of layers that a device could gather at once -> its path; not those that one use takes, too."""
    layout, uses = subject.layout, subject.uses
    if subject.trace.pipeline:
        return _stacks_of_a_pipeline(layout, subject.trace.pipeline)
    used = {use.num_whole for use in uses}  # a slice of one leaf may be as large as another's stack
    stacks: dict[int, str] = {}
    for use in uses:
        size = layout.num_elements(use.leaf, apart=ALSO_AXES)
        if use.level and size not in used:
            stacks.setdefault(size, layout.placements[use.leaf].leaf.path)
    return stacks


def _stacks_of_a_pipeline(layout: Layout, pipeline: dict[str, Any]) -> dict[int, str]:
    rows = max(pipeline["layers_per_stage"]) * pipeline["chunks"]
    params = [(i, p.leaf.path) for i, p in enumerate(layout.placements) if p.leaf.role == "params"]
    sizes = {path: layout.num_elements(index, apart=(*ALSO_AXES, "pipe")) for index, path in params}
    shapes = {path: layout.avals[index].shape for index, path in params}
    layers = {path: size // shapes[path][0] for path, size in sizes.items() if path.startswith("params/layers/")}
    used = {*layers.values(), *(size for path, size in sizes.items() if path not in layers)}
    return {size * rows: path for path, size in layers.items() if size * rows not in used}


def _kept_whole(subject: Subject) -> Iterator[Fault]:
    """Stage 3: what the forward pass gathered is given up, and gathered again for the backward pass.

    Only the last use's parameter may stay: its backward pass comes next (a language model's head).
    """
    if subject.options.stage.gather != "use" or subject.trace.pipeline:
        return  # of a pipeline nothing that is gathered leaves its tick: it is no part of what the loop over ticks carries
    found = memory.kept(subject.measured.memory, _kept_by_design(subject))
    rows = [
        f"{buffer.shape} ({buffer.bytes:,} bytes, {buffer.instruction}) from {buffer.source or buffer.op_name}"
        for buffer in sorted(found, key=lambda buffer: -buffer.bytes)
        if buffer.bytes > SMALL_BYTES
    ]
    if rows:
        yield Fault(
            f"{len(rows)} gathered weights are kept from forward to backward",
            tuple(rows[:MOST_ROWS]),
            "Save no gathered weight: give jax.checkpoint a policy that leaves parameters out.",
        )


def _kept_by_design(subject: Subject) -> set[int]:
    """Elements of the parameters that are used forward and at once backward."""
    uses = subject.uses
    if subject.is_composed:
        last = kept_use(uses)
        return {last.num_elements, last.num_whole} if last is not None else set()
    pairs = itertools.pairwise(uses)
    at_once = [use for use, after in pairs if (use.leaf, use.level) == (after.leaf, after.level)]
    return {size for use in at_once for size in (use.num_elements, use.num_whole)}


def _names_no_axis(eqn: Any) -> bool:
    spec = getattr(eqn.params["sharding"], "spec", ())
    return all(entry is None for entry in spec)


def _reduced_in_a_loop(subject: Subject) -> Iterator[Fault]:
    """Stages 0 and 1: gradients are reduced once a step. A loop over layers does that; one over microbatches does it again."""
    if subject.options.stage.reduce != "step" or (subject.is_composed and not subject.trace.manual):
        return  # a loss whose examples meet is reduced in every microbatch by its meaning: a finding names it
    inside = [one for one in subject.over_batch("all-reduce", "reduce-scatter") if one.loop_depth and one.count]
    layout = subject.layout
    of_params = (index for index, placement in enumerate(layout.placements) if placement.leaf.role == "params")
    num_params = sum(map(layout.num_elements, of_params))
    if sum(one.elements * (one.count or 1) for one in inside) > REPEATED * num_params:
        largest = sorted(inside, key=lambda one: -one.elements * (one.count or 1))[:MOST_ROWS]
        yield Fault(
            "gradients are reduced in a loop",
            tuple(map(subject.describe, largest)),
            "Let jzero take the gradient, which it reduces once: jzero.make_train_step(loss_fn, optimizer, accumulate=k).",
        )


def _gathered_wide(subject: Subject) -> Iterator[Fault]:
    """What is gathered for the loss travels in the compute dtype. CPU compilers widen it, so there it is not looked at."""
    if not subject.is_composed or not subject.trace.manual or subject.platform == "cpu":
        return
    compute = np.dtype(subject.fn.policy.compute).itemsize
    least = subject.options.min_shard_elements
    wide, excess = [], 0
    for one in subject.over_batch("all-gather"):
        large = [array for array in one.arrays if array.elements >= least and array.bytes > array.elements * compute]
        if "shard_map" in one.op_name and large:
            wide.append(subject.describe(one))
            extra = sum(array.bytes - array.elements * compute for array in large) * (one.count or 1)
            excess += audit.moved(one.kind, extra, hlo.group_size(one.groups))
    # Vectors that a model computes with in float32, as norms, may travel so: the compiler casts them before the gather.
    if excess > _allowed(subject):
        name = np.dtype(subject.fn.policy.compute).name
        yield Fault(f"parameters are gathered wider than {name}", tuple(wide[:MOST_ROWS]), "Cast after the parameter's use.")


def _shuffled(subject: Subject) -> Iterator[Fault]:
    """No stage moves anything but parameters and gradients: all-to-alls and permutes are the partitioner's guesses."""
    axes = set(batch_axes(subject.options.mesh))
    shuffles = [
        one
        for one in audit.shuffles(subject.measured)
        if one.op_name  # without one it is the compiler's own way to overlap a gather with a product, not the partitioner's
        and not any(name in one.op_name for name in ASKED_FOR)
        and set(hlo.axis_of(one.groups, subject.options.mesh).split("+")) <= axes  # others follow the user's own constraints
        and (not subject.is_composed or "shard_map" in one.op_name)
    ]
    bytes_moved = sum(audit.moved(one.kind, one.full_bytes * (one.count or 1), hlo.group_size(one.groups)) for one in shuffles)
    if bytes_moved > _allowed(subject):
        largest = sorted(shuffles, key=lambda one: -one.full_bytes * (one.count or 1))[:MOST_ROWS]
        yield Fault(
            f"{len(shuffles)} all-to-alls and permutes that nobody asked for move {bytes_moved:,} bytes",
            tuple(map(subject.describe, largest)),
            "Constrain the batch dim of the arrays made there.",
        )


def _allowed(subject: Subject) -> float:
    """Bytes per step that may move beside the formula."""
    expected = sum(amount for kinds in subject.formula.values() for amount in kinds.values())
    return max(ALLOWED_SHARE * expected, SMALL_BYTES)


def place(sharding: Any) -> str:
    """A sharding as a message names it."""
    where = f"on mesh {dict(sharding.mesh.shape)}" if hasattr(sharding, "mesh") else f"on {len(sharding.device_set)} device(s)"
    memory = f" in {sharding.memory_kind}" if sharding.memory_kind not in (None, "device") else ""
    return f"{getattr(sharding, 'spec', type(sharding).__name__)} {where}{memory}"
