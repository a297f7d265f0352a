"""A compiled step's report: the audit of its program beside the formulas of its stage."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

import pallas_kernels
from jzero import audit as audits
from jzero import hlo, traffic
from jzero._specs import axes as axes_of
from jzero._specs import without_zero, zero_split
from jzero._tree import num_bytes, short
from jzero._types import ALSO_AXES, BATCH_AXES, ROLES, ZERO_AXES, ZERO_BATCH_AXES
from jzero.engine import experts, memory, serving
from jzero.engine.achieved import ASKED_FOR, Subject
from jzero.engine.layout import Layout, Options, Trace
from jzero.mesh import axis_size, batch_axes
from jzero.offload.asked import HOST
from jzero.offload.host import KIND
from jzero.offload.states import DEVICE
from jzero.report import Report
from jzero.rules import batch_spec
from jzero.step import TrainStep
from jzero.step import params as parameters


def subject(fn: Any, layout: Layout, options: Options, trace: Trace, compiled: Any) -> Subject:
    """A compiled step with what was measured on it and what its stage promises."""
    measured = audits.audit(compiled, options.mesh)
    uses = list(trace.reading.uses(trace.jaxpr, trace.facts)) if trace.jaxpr is not None else []
    formula = _formula(fn, layout, options, trace, uses)
    return Subject(fn, layout, options, trace, compiled, measured, formula, uses)


def report(subject: Subject, faults: Sequence[str], batch: tuple[Any, ...], num_compiled: int) -> Report:
    """The report of one compiled program; `faults` are the promises that it breaks."""
    fn, layout, options, trace, compiled, measured, formula, _ = subject
    in_shardings = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding))
    resting = _resting(layout, batch, in_shardings[: len(layout.avals)], options)
    reused = measured.parameters[-len(in_shardings) :][: len(layout.avals)]
    return Report(
        stage=options.stage.number,
        engine=_engine(fn, trace),
        mesh=dict(options.mesh.shape),
        bytes_at_rest=resting,
        wire_bytes=_side_by_side(audits.wire(measured.collectives, options.mesh, as_meant=True), formula),
        temp_bytes=measured.temp_bytes,
        peak_bytes=measured.peak_bytes,
        peak_in_use=_peak_in_use(options),
        peak_buffers=memory.at_peak(measured.memory),
        memory_timeline=memory.timeline(measured.memory, {role: row["measured"] for role, row in resting.items()}),
        collectives=serving.collectives(subject),
        kernels=_kernels(trace),
        donated={"leaves": sum(parameter.aliased for parameter in reused), "of": len(layout.avals)},
        num_compiled=num_compiled,
        leaves=leaf_rows(layout),
        findings=[*faults, *_findings(layout, options, trace, measured)],
        programs={
            "wire_bytes_as_compiled": measured.wire_bytes,
            "wire_elements": measured.wire_elements,
            "argument_bytes": measured.argument_bytes,
            "alias_bytes": measured.alias_bytes,
            **({"pipeline": trace.pipeline} if trace.pipeline else {}),
        },
    )


def _engine(fn: Any, trace: Trace) -> str:
    if not isinstance(fn, TrainStep):
        return "opaque"
    if trace.pipeline:
        return f"pipeline ({trace.pipeline['schedule']})"
    return "composed" if trace.manual else "composed (global)"


def _kernels(trace: Trace) -> list[dict[str, Any]]:
    """Every call of an operation with several implementations: the program says which, what was recorded says why.

    A function that was traced before, under a `jit` of the user's, is not traced again: then no reason is known.
    """
    why = {choice._replace(reason=""): choice.reason for choice in trace.choices}
    found = pallas_kernels.found_in(trace.jaxpr) if trace.jaxpr is not None else []
    counts = Counter(choice._replace(reason="") for choice in found)
    # The update is no part of a composed step's `jaxpr`, which is its loss: what was recorded while it was traced is all of it.
    ops = {choice.op for choice in found}
    counts += Counter(choice._replace(reason="") for choice in trace.choices if choice.op not in ops)
    return [
        {**choice._asdict(), "arrays": list(choice.arrays), "reason": why.get(choice, "traced before"), "calls": calls}
        for choice, calls in counts.items()
    ]


def _resting(layout: Layout, batch: Any, shardings: list[Any], options: Options) -> dict[str, dict[str, int]]:
    """By role: what the compiled program's inputs take on one device, and what the stage promises leaf by leaf."""
    table: dict[str, dict[str, int]] = {role: {"measured": 0, "formula": 0} for role in ROLES}
    for placement, aval, sharding, place in zip(layout.placements, layout.avals, shardings, layout.places, strict=True):
        row = table[placement.leaf.role]
        if sharding.memory_kind == KIND or (place is not None and sharding.memory_kind is None):  # None: a described GPU
            continue
        row["measured"] += audits.shard_bytes(aval, sharding)
        row["formula"] += num_bytes(aval) // num_pieces(placement.spec, options)
    for leaf in jax.tree.leaves(batch):
        size = num_bytes(jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.dtypes.result_type(leaf)))
        per_device = size // num_pieces(batch_spec(leaf, options.mesh), options)
        table["batch"]["measured"] += per_device
        table["batch"]["formula"] += per_device
    return table


def num_pieces(spec: PartitionSpec, options: Options) -> int:
    """Devices that hold different pieces of a leaf."""
    names = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    return axis_size(options.mesh, names)


def _formula(fn: Any, layout: Layout, options: Options, trace: Trace, uses: list[Any]) -> traffic.Table:
    if options.mesh.size == 1:
        return {}
    if trace.formula is not None:
        return trace.formula
    return _composed(fn, layout, options, trace, uses) if isinstance(fn, TrainStep) else _opaque(layout, options, trace, uses)


def _composed(fn: TrainStep, layout: Layout, options: Options, trace: Trace, uses: list[Any]) -> traffic.Table:
    params = jax.tree.unflatten(layout.treedef, layout.avals).params
    mask = parameters.trainable_mask(params, fn.trainable)
    rows = [_param(layout, options, index, trains) for index, trains in enumerate(mask)]
    micro = fn.accumulate
    wire = traffic.Wire(fn.policy.compute, fn.policy.reduce, fn.policy.reduce_once, micro)
    axes = {name: size for name, size in options.mesh.shape.items() if name in (*BATCH_AXES, *ALSO_AXES)}
    table = traffic.composed(options.stage, rows, uses, wire, axes, trace.num_scalars)
    return {**table, **experts.wire(experts.exchanges(trace.jaxpr, options.mesh), options.mesh, micro)}


def _param(layout: Layout, options: Options, index: int, trains: bool) -> traffic.Param:
    entries = layout.split(index)
    rest = tuple(axis for axis in batch_axes(options.mesh) if axis not in axes_of(entries))
    whole = layout.num_elements(index, apart=ALSO_AXES)
    return traffic.Param(layout.num_elements(index), zero_split(entries), trains, rest, whole, _also(entries))


def _opaque(layout: Layout, options: Options, trace: Trace, uses: list[Any]) -> traffic.Table:
    split_owners = trace.to_shards | {
        p.leaf.owner for i, p in enumerate(layout.placements) if p.leaf.owner is not None and _has_data(layout.split(i))
    }
    zero = tuple(name for name in ZERO_BATCH_AXES if name in options.mesh.axis_names)
    taken = lambda index: {name for entry in layout.split(index) for name in without_zero(entry)}
    rows = {
        index: traffic.OpaqueParam(
            layout.num_elements(index), layout.num_elements(index, apart=ALSO_AXES), aval.dtype, index in split_owners,
            zero_split(layout.split(index)) or tuple(name for name in zero if name not in taken(index)),
        )
        for index, (aval, placement) in enumerate(zip(layout.avals, layout.placements, strict=True))
        if placement.leaf.role == "params"
    }  # fmt: skip
    axes = {name: size for name, size in options.mesh.shape.items() if name in ZERO_AXES}
    return traffic.opaque(options.stage, rows, uses, axes)


def _also(split: tuple[Any, ...]) -> tuple[str, ...]:
    """The axes beside its batch axes that ZeRO splits a leaf over."""
    return tuple(axis for axis in ALSO_AXES if axis in axes_of(split))


def _has_data(split: tuple[Any, ...]) -> bool:
    return bool(zero_split(split))


def _side_by_side(measured: traffic.Table, formula: traffic.Table) -> dict[str, dict[str, dict[str, int]]]:
    def kinds(axis: str) -> list[str]:
        return sorted({*measured.get(axis, {}), *formula.get(axis, {})})

    return {
        axis: {
            kind: {"measured": measured.get(axis, {}).get(kind, 0), "formula": formula.get(axis, {}).get(kind, 0)}
            for kind in kinds(axis)
        }
        for axis in sorted({*measured, *formula})
    }


def leaf_rows(layout: Layout) -> list[dict[str, Any]]:
    """One row per leaf of a state: what it is and where it rests."""
    return [
        {
            "path": placement.leaf.path, "dtype": aval.dtype.name, "shape": list(aval.shape), "role": placement.leaf.role,
            "spec": str(placement.spec), "bytes_per_device": audits.shard_bytes(aval, sharding), "why": placement.why,
            "memory": (sharding.memory_kind or DEVICE) if place is None else KIND if place.kind == HOST else str(place),
        }
        for placement, aval, sharding, place in zip(
            layout.placements, layout.avals, layout.shardings, layout.places, strict=True
        )
    ]  # fmt: skip


def _findings(layout: Layout, options: Options, trace: Trace, measured: audits.Audit) -> list[str]:
    """What a reader should know: leaves that stayed whole, examples that meet, collectives that nobody asked for."""
    found = [*trace.findings, *_idle_axes(layout, options)]
    if trace.jaxpr is not None:
        found += experts.findings(experts.exchanges(trace.jaxpr, options.mesh))
    if options.stage.number > 0 and axis_size(options.mesh, ZERO_BATCH_AXES) > 1:
        whole = [
            f"{p.leaf.path} {short(aval)} stays whole: {p.why}"
            for p, aval, index in zip(layout.placements, layout.avals, range(len(layout.avals)), strict=True)
            if p.leaf.role == "params" and not _has_data(layout.split(index)) and _wants_data(p, options)
        ]
        found += whole[:10] + (
            [f"... and {len(whole) - 10} more parameters stay whole: see leaf_table()"] if len(whole) > 10 else []
        )
        if not trace.to_shards and not any(_has_data(layout.split(index)) for index in range(len(layout.avals))):
            found.append(f"stage {options.stage.number} shards nothing: no leaf is large enough and divisible")
    respelled = [one for one in measured.collectives if one.kind == "all-reduce" and audits.meaning(one) != one.kind]
    if respelled:
        as_written = audits.wire(respelled, options.mesh).values()
        more = sum(sum(kinds.values()) for kinds in as_written) - sum(map(audits.wire_bytes, respelled))
        told = f"the compiler wrote {len(respelled)} reduce-scatters or gathers as all-reduces, which move {more:,} bytes more "
        found.append(f"{told}than counted above (docs/troubleshooting.md)")
    found += [
        f"waits for the host: {one.what} of {one.bytes:,} bytes from {one.source or one.op_name or 'the compiler'}"
        for one in hlo.host_transfers(measured.module)[:10]
        if one.what != "copy" or not (options.saves_on_host or options.offload)  # asked for
    ]
    if options.saves_on_host and not memory.shows_host(options.mesh):
        found.append("this compiler does not show memories apart: whether activations are saved in host memory is not checked")
    # Names of JAX's own collectives are what the user, a pipeline or `jzero.attention` asked for.
    strays = [one for one in audits.shuffles(measured) if not any(name in one.op_name for name in ASKED_FOR)]
    found += [f"nobody asked for: {audits.describe(one, options.mesh)}" for one in strays[:10]]
    found += [
        f"in a loop of unknown length, counted once: {audits.describe(one, options.mesh)}"
        for one in audits.unknown_loops(measured)[:10]
    ]
    return found


def _idle_axes(layout: Layout, options: Options) -> list[str]:
    """Axes that neither split examples nor any leaf of the state."""
    used = {name for p in layout.placements for entry in p.spec for name in (entry if isinstance(entry, tuple) else (entry,))}
    used |= {*batch_axes(options.mesh), *ALSO_AXES, *(["pipe"] if options.schedule is not None else [])}
    idle = [name for name, size in options.mesh.shape.items() if size > 1 and name not in used]
    return [
        f"axis '{name}' ({options.mesh.shape[name]}) splits no leaf: its devices repeat each other's work, unless constraints "
        "in the step itself use it"
        for name in idle
    ]


def _wants_data(placement: Any, options: Options) -> bool:
    """Leaves that are whole because their role is, at this stage, are no finding."""
    return any(words in placement.why for words in ("under min_shard_elements", "is a multiple of", "is free"))


def _peak_in_use(options: Options) -> int | None:
    """The most memory that this process's devices of the mesh have had in use, where the runtime counts it."""
    found = []
    for device in options.mesh.local_devices if _is_real(options) else ():
        stats = device.memory_stats() or {}
        found += [int(stats["peak_bytes_in_use"])] if "peak_bytes_in_use" in stats else []
    return max(found, default=None)


def _is_real(options: Options) -> bool:
    """Whether the devices are there (on the default platform), and not only described."""
    return set(options.mesh.devices.flat) <= set(jax.devices())
