"""Compiled steps whose state rests off the device: the gradient program and the buckets' programs, run one after the other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jzero import audit, traffic
from jzero._tree import num_bytes
from jzero.engine import composed, computing, fetching, offloaded, programs, reporting
from jzero.engine.bringing import Bringing
from jzero.engine.by_slices import SlicedProgram
from jzero.engine.layout import Layout, Options, Trace
from jzero.engine.offloaded import Carried, Update
from jzero.engine.programs import Program, with_statics
from jzero.engine.statics import Statics
from jzero.gather.facts import kept_use
from jzero.offload.asked import DEVICE, HOST, NVME
from jzero.offload.stream import Leaves, Stream
from jzero.report import Report
from jzero.step import TrainStep


class StreamedProgram(Program):
    """One step in several programs. `lowered` and `compiled` are the gradient program's."""

    def __init__(
        self, fn: TrainStep, plan: Update, options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...]
    ):  # fmt: skip
        self.keeps = keeps(options)
        lowered, trace, plan = lower(fn, plan, options, statics, batch)
        super().__init__(placed, statics, lowered, trace)
        self.own_layout, self.plan, self.options = plan.rest_layout, plan, options
        self.skips, self.accumulate = fn.skip_nonfinite, fn.accumulate
        self.buckets = [SlicedProgram(plan, bucket, options, keeps_params=self.keeps) for bucket in plan.buckets]
        self.rounds = [(program, number) for program in self.buckets for number in range(program.num_rounds)]
        self.bringing = Bringing(placed, options, plan.compute_dtype, plan.bucket_bytes)

    def call(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        try:
            return self._call(state, *batch)
        except BaseException:
            for tier in self.options.tiers.values():
                tier.cancel()
            raise

    def _call(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        """The gradient program is only dispatched when the first two buckets start on their way."""
        plan, old = self.plan, jax.tree.leaves(state)
        stream, brought = self._begun(int(state.step), old) if self.keeps else (None, {})
        here = dict(enumerate(old)) | brought
        rest, (metrics, carried) = self.compiled(plan.rest(jax.tree.unflatten(self.layout.treedef, here.values())), *batch)
        for index in brought.keys() - plan.held:
            here.pop(index).delete()
        given_back = plan.kept[self.trace.kept :]
        new = dict(enumerate(old)) | dict(zip(given_back, jax.tree.leaves(rest), strict=True))
        if stream is None:
            stream = self._stream(new)
            stream.begin(0)
        stream.start()
        if self.skips and not bool(carried.proceed):
            stream.cancel()
        else:
            in_work: dict[SlicedProgram, list[jax.Array]] = {}
            for (program, _), leaves in zip(self.rounds, stream.run(self._update(carried, here, in_work)), strict=True):
                new |= zip(program.fetched, map(program.whole, leaves), strict=True)
            for program, params in in_work.items():
                new |= zip(program.bucket.params, params, strict=True)
        if self.keeps and self.options.donate:
            _let_go(old, new)
        return jax.tree.unflatten(self.layout.treedef, [new[index] for index in range(len(old))]), metrics

    def _begun(self, number: int, old: list[Any]) -> tuple[Stream, dict[int, jax.Array]]:
        """Where old leaves stay valid all journeys are known now, and files are read from here on: parameters first."""
        stream, trips = self._stream(dict(enumerate(old))), self.bringing.trips(old)
        stream.begin(number, self.bringing.by_place(trips))
        return stream, self.bringing.bring(trips)

    def _stream(self, state: dict[int, Any]) -> Stream:
        gives_up = self.options.donate and not self.keeps
        return Stream([self._leaves(*one, state) for one in self.rounds], self.options.tiers, gives_up=gives_up)

    def _leaves(self, program: SlicedProgram, number: int, state: dict[int, Any]) -> Leaves:
        chosen = [program.members.index(index) for index in program.fetched]
        shardings, places = [program.shardings[at] for at in chosen], [program.places[at] for at in chosen]
        return Leaves(program.at_rest(state, number), shardings, places, [index in self.plan.held for index in program.fetched])

    def _update(self, carried: Carried, here: dict[int, Any], in_work: dict[SlicedProgram, list[jax.Array]]) -> Any:
        """What each round computes from what came and what is `here`; `in_work` gets the parameters that are made in several
        rounds.
        """

        def update(number: int, leaves: list[jax.Array]) -> list[jax.Array]:
            program, index = self.rounds[number]
            grads = [carried.grads[at] for at in program.param_at]
            round_of: list[Any] = [np.int32(index)] if program.num_rounds > 1 else []
            values = (carried.scales, carried.shared, carried.early, *round_of)
            if program.num_rounds > 1 and not program.params_travel:
                own = [here[at] for at in program.bucket.params]
                in_work[program], new = program.compiled(own, leaves, in_work.get(program, grads), *values)
                return new
            held = {at: here[at] for at in program.bucket.params if at in self.plan.held}
            leaves = [held.get(at, leaf) for at, leaf in zip(program.fetched, leaves, strict=True)]
            new = program(leaves, grads, *values)
            if index == program.num_rounds - 1:
                for array in (*grads, *held.values()):
                    if not array.is_deleted():
                        array.delete()
            return new

        return update


def keeps(options: Options) -> bool:
    """Whether the state that came in stays until all is well."""
    return any(one.can_fail for one in options.tiers.values())


def lower(
    fn: TrainStep, plan: Update, options: Options, statics: Statics, batch: tuple[Any, ...]
) -> tuple[Any, Trace, Update]:  # fmt: skip
    """The gradient program, lowered; and the update as that program leaves it to do."""
    if fetching.is_asked(options):
        plan = replace(plan, at_use=composed.at_use(with_statics(fn, options, statics), plan.rest_layout, options, batch))
    step = offloaded.gradient_step(fn, plan)
    away = [plan.layout.shardings[index] if index in plan.at_use else None for index in plan.trained]
    carried: Any = Carried(away, *(None,) * 4)  # pyrefly: ignore[bad-argument-type]
    aux_shardings = (None, carried) if plan.at_use else None  # without it a compiler forgets their memory
    lowered, trace = programs.lower(
        step, options, plan.rest_layout, statics, batch, keeps_params=keeps(options), aux_shardings=aux_shardings
    )
    return lowered, trace, plan


def _let_go(old: list[Any], new: dict[int, Any]) -> None:
    """Give up the leaves of the old state that the new one does not share: as donation would have, but after the step."""
    for index, leaf in enumerate(old):
        if isinstance(leaf, jax.Array) and leaf is not new[index]:
            leaf.delete()


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
    told = [*plan.computed.findings, *(line for tier in program.options.tiers.values() for line in tier.findings)]
    return replace(
        found, bytes_at_rest=resting, temp_bytes=temp, peak_bytes=on_device + temp, leaves=rows, offload=offload,
        findings=[*found.findings, *_kept(program, sum(map(shard, beside))), *told],
        num_compiled=found.num_compiled + len(program.buckets) + bringing.num_programs,
    )  # fmt: skip


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
