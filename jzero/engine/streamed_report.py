"""The report of a step whose state rests off the device: of its gradient program, completed by its updates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jzero import audit, traffic
from jzero._tree import num_bytes
from jzero.engine import computing, reporting
from jzero.engine.by_slices import SlicedProgram
from jzero.engine.layout import Layout, Options
from jzero.engine.streaming import StreamedProgram
from jzero.gather.facts import kept_use
from jzero.offload.asked import DEVICE, HOST, NVME
from jzero.report import Report


def report(program: StreamedProgram, found: Report) -> Report:
    """The gradient program's report, completed by what the update programs need and what rests elsewhere."""
    layout, plan = program.layout, program.plan
    rows = reporting.leaf_rows(layout)
    at_rest: dict[str, int] = {}
    for row in rows:
        at_rest[row["memory"]] = at_rest.get(row["memory"], 0) + row["bytes_per_device"]
    resting = {role: {name: size or 0 for name, size in figure.items()} for role, figure in found.bytes_at_rest.items()}
    bringing = program.bringing
    if bringing.groups:
        resting["params"] = _without(resting["params"], bringing.layout, bringing.at_rest.in_files, program.options)
    beside = {index for index in plan.arrays if layout.places[index] is None}
    for bucket in program.buckets:
        own, opt_state, *_ = bucket.compiled.input_shardings[0]
        given = [*own, *opt_state]
        for index, sharding in zip(bucket.members, given, strict=True):
            if index in beside:  # optimizer state that rests on the device; the gradient program does not take it
                figure = resting["opt_state"]
                figure["measured"] += audit.shard_bytes(layout.avals[index], sharding)
                spec = layout.placements[index].spec
                figure["formula"] += num_bytes(layout.avals[index]) // reporting.num_pieces(spec, program.options)
    buckets, fetched, left = [_figures(bucket) for bucket in program.buckets], *_at_use(program)
    grads = sum(row["grad_bytes"] for row in buckets)
    pairs = [sum(row["held_bytes"] for row in buckets[at : at + 2]) for at in range(len(buckets))]
    first = bringing.brought_bytes + found.temp_bytes + grads + (pairs[0] if pairs else 0)
    shard = lambda index: audit.shard_bytes(layout.avals[index], layout.on_device[index])
    in_files = [index for index, place in enumerate(layout.places) if place and place.kind == NVME]
    frozen = {index for index, trains in enumerate(plan.mask) if not trains}  # parameters come first in a TrainState
    held = sum(map(shard, plan.held)) + (sum(map(shard, beside)) if program.keeps else 0)
    updates = [held + grads + pair + row["temp_bytes"] for pair, row in zip(pairs, buckets, strict=True)]
    temp = max(first, *updates)
    on_device = sum(figure["measured"] for figure in resting.values())
    offload = {
        "at_rest": at_rest,
        "bucket_bytes": plan.bucket_bytes,
        "buckets": buckets,
        "moved_bytes": sum(row["moved_bytes"] for row in buckets),
        "file_bytes": sum(shard(index) * (1 if index in frozen else 2) for index in in_files),
        "brought_bytes": bringing.read_bytes,
        "brought_in": len(bringing.groups),
        "held_bytes": sum(map(shard, plan.held)),
        "fetched_bytes": fetched,  # by the gradient program, of parameters that come at their uses; and their gradients
        "left_bytes": left,
        "grads_in_host_bytes": sum(row["grads_in_host_bytes"] for row in buckets),
        "back_bytes": sum(row["back_bytes"] for row in buckets),
        "gradient_temp_bytes": found.temp_bytes,
        "grad_bytes": grads,
        "places": {tier.name: tier.describe() for tier in program.options.tiers.values()},
        "settings": str(program.options.offload),
        "update": plan.computed.to_dict(),
    }
    empty = [place for place in program.options.tiers if place not in layout.places]
    told = [f"nothing rests in {place}: what {program.options.offload} keeps on the device is all of it" for place in empty]
    told += [*plan.computed.findings, *(line for tier in program.options.tiers.values() for line in tier.findings)]
    return replace(
        found, bytes_at_rest=resting, wire_bytes=_with_updates(found.wire_bytes, program), temp_bytes=temp,
        peak_bytes=on_device + temp, leaves=rows, offload=offload,
        findings=[*found.findings, *_kept(program, sum(map(shard, beside))), *told],
        num_compiled=found.num_compiled + len(program.buckets) + bringing.num_programs,
    )  # fmt: skip


def _with_updates(table: Any, program: StreamedProgram) -> dict[str, dict[str, dict[str, int]]]:
    """The gradient program's wire bytes and the updates': of a step that keeps its parameters whole they gather those."""
    every = {axis: {kind: dict(row) for kind, row in kinds.items()} for axis, kinds in table.items()}
    mesh = program.options.mesh
    for bucket in program.buckets if mesh.size > 1 else ():
        for axis, kinds in audit.wire(audit.audit(bucket.compiled, mesh).collectives, mesh, as_meant=True).items():
            for kind, amount in kinds.items():
                row = every.setdefault(axis, {}).setdefault(kind, {"measured": 0, "formula": 0})
                row["measured"] += amount * bucket.num_rounds
    return every


def _at_use(program: StreamedProgram) -> tuple[int, int]:
    """Bytes per device that come to the gradient program of a step, and that leave it: parameters for the forward and again for
    the backward pass, but for a use that keeps them; gradients, and where several microbatches are added up their sums so far.
    """
    plan, trace = program.plan, program.trace
    if not plan.at_use:
        return 0, 0
    uses = list(trace.reading.uses(trace.jaxpr, trace.facts))
    kept, layout = kept_use(uses), plan.layout
    size = {index: audit.shard_bytes(layout.avals[index], layout.on_device[index]) for index in plan.at_use}
    trained = sum(size[index] for index in plan.at_use if plan.mask[index])
    times = {use.leaf: 1 if use is kept else traffic.num_gathers(use) for use in uses if use.leaf in size}
    fetched = sum(size[index] * times[index] for index in size)
    sums = trained if program.accumulate > 1 else 0
    return program.accumulate * (fetched + sums), program.accumulate * trained


def _kept(program: StreamedProgram, num_bytes: int) -> list[str]:
    """What a step that may fail costs where moments rest on the device."""
    if not program.keeps or not num_bytes:
        return []
    return [
        f"{num_bytes:,} bytes of moments rest on the device beside leaves in files: until these are written the old ones stay "
        "there beside the new, so that a step that fails loses nothing"
    ]


def _without(figure: dict[str, int], layout: Layout, numbers: Sequence[int], options: Options) -> dict[str, int]:
    """Bytes at rest without some leaves, which the gradient program takes and which are gone after the step."""
    found = dict(figure)
    for index in numbers:
        found["measured"] -= audit.shard_bytes(layout.avals[index], layout.on_device[index])
        found["formula"] -= num_bytes(layout.avals[index]) // reporting.num_pieces(layout.placements[index].spec, options)
    return found


def _figures(one: SlicedProgram) -> dict[str, Any]:
    """One update program: bytes per device."""
    memory, layout = one.compiled.memory_analysis(), one.plan.layout
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    already = [index for index in one.bucket.params if index in one.plan.held]
    held = sum(audit.shard_bytes(layout.avals[index], layout.on_device[index]) for index in already)
    load = computing.load_of(one.plan, one.bucket)
    return {
        "leaves": len(one.members),
        "update": HOST if one.bucket.on_host else DEVICE,
        "moved_bytes": load.out if one.bucket.on_host else load.into,  # to the device, or to the host: the longer way
        "back_bytes": load.beside if one.bucket.on_host else load.moved,
        # Of slices: in temp_bytes.
        "held_bytes": 0 if one.slices or one.bucket.on_host else one.held_bytes - held // one.num_rounds,
        "slices": one.slices.num if one.slices else one.num_rounds,
        "grad_bytes": load.grads - load.grads_there,
        "grads_in_host_bytes": load.grads_there,
        "temp_bytes": int(memory.temp_size_in_bytes) + max(int(beyond), 0),
    }
