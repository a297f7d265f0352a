"""What a pipeline costs beside its arithmetic, known before it is compiled: buffers, bubbles, padding, bytes on the wire.

The formula counts what the executor asks for, collective by collective. Layers are gathered and reduced in every tick that any
device needs it, so stages 2 and 3 move more than their M microbatches would: `ticks_beyond_need` says how much.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero._tree import num_bytes, num_elements
from jzero.audit import moved
from jzero.engine.stage_layers import StageLayers
from jzero.pipeline import executor
from jzero.pipeline.schedule import Schedule
from jzero.pipeline.slots import Slots
from jzero.precision import PrecisionPolicy
from jzero.stages import Stage

Table = dict[str, dict[str, int]]


class Part(NamedTuple):
    """One parameter leaf as a pipeline holds it."""

    num_elements: int
    part: str  # "layers", "embed", "head" or "tied"
    is_split: bool  # over data, by ZeRO
    trains: bool
    pipe_dim: int | None  # where it is split over pipe at rest


class Plan(NamedTuple):
    """Everything that the costs follow from."""

    schedule: Schedule
    slots: Slots
    stages: StageLayers
    is_stacked: bool
    num_layers: int
    parts: Sequence[Part]
    x: Sequence[Any]  # what travels between layers
    saved: Sequence[Any]  # per layer and microbatch
    kept: Sequence[Any]
    stage: Stage
    policy: PrecisionPolicy
    axes: dict[str, int]  # of the mesh, in its order: replica, data, pipe
    num_scalars: int
    busy_ticks: tuple[int, ...]  # in how many ticks some device embeds, ends, returns, and makes weight gradients


def summary(plan: Plan) -> dict[str, Any]:
    """Plain numbers for the report. Bytes are per device."""
    schedule, slots, rows = plan.schedule, plan.slots, plan.stages.largest if plan.is_stacked else 1
    size = lambda leaves: sum(map(num_bytes, leaves))
    needed = schedule.num_microbatches * schedule.num_chunks
    turns = {"gather": 2 * needed, "reduce": needed}
    runs = {"gather": schedule.num_ticks, "reduce": plan.busy_ticks[3]}
    in_ticks = {"gather": plan.stage.gather == "use", "reduce": plan.stage.reduce == "use"}
    some = any(part.is_split for part in plan.parts)
    beyond = {what: runs[what] / turns[what] - 1 for what in turns if in_ticks[what] and some}
    return {
        "schedule": schedule.name,
        "pipe_stages": schedule.num_pipe_stages,
        "chunks": schedule.num_chunks,
        "microbatches": schedule.num_microbatches,
        "ticks": schedule.num_ticks,
        "bubble_fraction": schedule.bubble_fraction,
        "waiting_fraction": schedule.waiting_fraction,
        "stash_bytes": slots.num_saved * rows * size(plan.saved),
        "weight_stash_bytes": slots.num_kept * rows * size(plan.kept),
        "exchange_bytes": (max(slots.num_activations, 1) + max(slots.num_gradients, 1)) * size(plan.x),
        "layers_per_stage": list(plan.stages.counts),
        "padding_fraction": plan.stages.padding if plan.is_stacked else 0.0,
        "ticks_beyond_need": beyond,
    }


def findings(facts: dict[str, Any], plan: Plan) -> list[str]:
    """The summary in words, and what a reader may not expect."""
    stash = facts["stash_bytes"] + facts["weight_stash_bytes"]
    found = [
        f"pipeline {facts['schedule']}: {facts['ticks']} ticks, bubble {facts['bubble_fraction']:.3f}; devices wait "
        f"{facts['waiting_fraction']:.3f} of the time if backward takes two forwards, for a tick lasts as long as its slowest "
        f"operation; stash {stash:,} bytes for {max(plan.schedule.live)} inputs"
    ]
    if facts["padding_fraction"]:
        counts = ", ".join(map(str, facts["layers_per_stage"]))
        found.append(
            f"uneven stages ({counts} layers) are padded to the largest: {facts['padding_fraction']:.1%} of the layers' "
            "buffers and gathers is padding; its arithmetic is skipped"
        )
    if plan.is_stacked and not (plan.stages.at_home and all(p.pipe_dim == 0 for p in plan.parts if p.part == "layers")):
        found.append(
            "layers rest in another order than the schedule runs them: gathered over pipe once a step, and reduced back"
        )
    whole = sum(part.num_elements for part in plan.parts if part.part == "layers" and part.pipe_dim is None)
    if whole:
        found.append(f"{whole:,} elements of layers rest whole over pipe: a list of layers, or no dim that divides")
    for what, share in facts["ticks_beyond_need"].items():
        found += [f"collectives run on all devices at once: layers {what} in {share:.0%} more ticks than need it"] * (share > 0)
    if "reduce" in facts["ticks_beyond_need"] or "gather" in facts["ticks_beyond_need"]:
        found.append("reductions and the ends' gathers run in the formula's ticks only; measured counts them in every tick")
    return found


def wire(plan: Plan) -> Table:
    """Bytes per device and step, by axis and kind."""
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(names: Sequence[str], kind: str, elements: float, dtype: Any) -> None:
        present = [name for name in plan.axes if name in names and plan.axes[name] > 1]
        members = 1
        for name in present:
            members *= plan.axes[name]
        if members > 1 and elements:
            table["+".join(present)][kind] += moved(kind, int(elements) * jnp.dtype(dtype).itemsize, members)

    for leaf in plan.x:
        add(["pipe"], "collective-permute", 2 * plan.schedule.num_ticks * num_elements(leaf), leaf.dtype)
    for part in plan.parts:
        _add_part(plan, part, add)
    add(["replica", "data", "pipe"], "all-reduce", plan.num_scalars, jnp.float32)
    return {axis: dict(kinds) for axis, kinds in table.items()}


def _add_part(plan: Plan, part: Part, add: Any) -> None:
    """One leaf: on its way to the layers' order, gathered over data, reduced over data, pipe and replicas."""
    policy, stage, num_data = plan.policy, plan.stage, plan.axes["data"] if part.is_split else 1
    is_row = part.part == "layers" and plan.is_stacked
    layer = part.num_elements / plan.num_layers
    held = plan.stages.largest * plan.schedule.num_chunks * layer if is_row else part.num_elements
    away = is_row and not (plan.stages.at_home and part.pipe_dim == 0)
    if away and part.pipe_dim is not None:
        add(["pipe"], "all-gather", part.num_elements / num_data, policy.compute)
    if part.is_split:
        gathers, reduces = _turns(plan, part)
        in_turn = plan.stages.largest * layer if is_row else part.num_elements
        add(["data"], "all-gather", held if stage.gather == "step" else gathers * in_turn, policy.compute)
        if part.trains:
            dtype = policy.reduce_once if stage.reduce == "step" else policy.reduce
            add(["data"], "reduce-scatter", held if stage.reduce == "step" else reduces * in_turn, dtype)
    if not part.trains:
        return
    if away and part.pipe_dim is not None:
        add(["pipe"], "reduce-scatter", part.num_elements / num_data, policy.accumulate)
    elif away or not is_row:
        add(["pipe"], "all-reduce", part.num_elements / num_data, policy.accumulate)
    rest = part.num_elements / num_data / (plan.schedule.num_pipe_stages if part.pipe_dim is not None else 1)
    add(["replica"] if part.is_split else ["replica", "data"], "all-reduce", rest, policy.reduce_once)


def busy_ticks(slots: Slots) -> tuple[int, ...]:
    """In how many ticks some device embeds, ends, returns, and makes weight gradients."""
    return tuple(int(count) for count in executor.flags(slots).sum(axis=0))


def _turns(plan: Plan, part: Part) -> tuple[int, int]:
    """How often a split leaf is gathered and reduced at stages 2 and 3: in ticks."""
    embeds, ends, returns, reduces = plan.busy_ticks
    gathers_here = plan.stage.gather == "use"
    if part.part == "layers":
        return plan.schedule.num_ticks * gathers_here, reduces
    at_embed, at_head = part.part != "head", part.part != "embed"
    gathers = at_embed * (embeds + returns) + at_head * ends
    return gathers * gathers_here, at_embed * returns + at_head * ends
