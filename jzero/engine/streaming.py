"""Compiled steps whose state rests off the device: the gradient program and the buckets' programs, run one after the other."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jzero import audit
from jzero._tree import num_bytes
from jzero.engine import computing, offloaded, programs, reporting
from jzero.engine.by_slices import SlicedProgram
from jzero.engine.layout import Layout, Options
from jzero.engine.offloaded import Carried, Update
from jzero.engine.programs import Program
from jzero.engine.statics import Statics
from jzero.offload.asked import DEVICE, HOST
from jzero.offload.stream import Leaves, Stream
from jzero.report import Report
from jzero.step import TrainStep


class StreamedProgram(Program):
    """One step in several programs. `lowered` and `compiled` are the gradient program's."""

    def __init__(
        self, fn: TrainStep, plan: Update, options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...]
    ):  # fmt: skip
        step = offloaded.gradient_step(fn, plan)
        self.keeps = any(one.can_fail for one in options.tiers.values())  # the state that came in, until all is well
        lowered, trace = programs.lower(step, options, plan.rest_layout, statics, batch, keeps_params=self.keeps)
        super().__init__(placed, statics, lowered, trace)
        self.own_layout, self.plan, self.options = plan.rest_layout, plan, options
        self.skips = fn.skip_nonfinite
        self.buckets = [SlicedProgram(plan, bucket, options, keeps_params=self.keeps) for bucket in plan.buckets]
        self.rounds = [(program, number) for program in self.buckets for number in range(program.num_rounds)]

    def call(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        """The gradient program is only dispatched when the first two buckets start on their way."""
        plan, old = self.plan, jax.tree.leaves(state)
        number = int(state.step) if self.keeps else 0
        rest, (metrics, carried) = self.compiled(plan.rest(state), *batch)
        given_back = plan.kept[self.trace.kept :]
        new = dict(enumerate(old)) | dict(zip(given_back, jax.tree.leaves(rest), strict=True))
        gives_up = self.options.donate and not self.keeps
        stream = Stream([self._leaves(*one, new) for one in self.rounds], self.options.tiers, gives_up=gives_up)
        stream.start(number)
        if self.skips and not bool(carried.proceed):
            stream.cancel()
        else:
            in_work: dict[SlicedProgram, list[jax.Array]] = {}
            for (program, _), leaves in zip(self.rounds, stream.run(self._update(carried, old, in_work)), strict=True):
                new |= zip(program.fetched, map(program.whole, leaves), strict=True)
            for program, params in in_work.items():
                new |= zip(program.bucket.params, params, strict=True)
        if self.keeps and self.options.donate:
            _let_go(old, new)
        return jax.tree.unflatten(self.layout.treedef, [new[index] for index in range(len(old))]), metrics

    def _leaves(self, program: SlicedProgram, number: int, state: dict[int, Any]) -> Leaves:
        chosen = [program.members.index(index) for index in program.fetched]
        shardings, places = [program.shardings[at] for at in chosen], [program.places[at] for at in chosen]
        return Leaves(program.at_rest(state, number), shardings, places)

    def _update(self, carried: Carried, old: list[Any], in_work: dict[SlicedProgram, list[jax.Array]]) -> Any:
        """What each round computes; `in_work` gets the parameters that are made in several rounds."""

        def update(number: int, leaves: list[jax.Array]) -> list[jax.Array]:
            program, index = self.rounds[number]
            grads = [carried.grads[at] for at in program.param_at]
            values = (carried.scales, carried.shared, carried.early)
            if program.num_rounds > 1:
                own = [old[at] for at in program.bucket.params]
                in_work[program], new = program.compiled(own, leaves, in_work.get(program, grads), *values, np.int32(index))
                return new
            new = program(leaves, grads, *values)
            for grad in grads:
                if not grad.is_deleted():
                    grad.delete()
            return new

        return update


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
    buckets = [_figures(bucket) for bucket in program.buckets]
    grads = sum(row["grad_bytes"] for row in buckets)
    pairs = [sum(row["held_bytes"] for row in buckets[at : at + 2]) for at in range(len(buckets))]
    first = found.temp_bytes + grads + (pairs[0] if pairs else 0)
    updates = [grads + pair + row["temp_bytes"] for pair, row in zip(pairs, buckets, strict=True)]
    temp = max(first, *updates)
    on_device = sum(figure["measured"] for figure in resting.values())
    offload = {
        "at_rest": at_rest,
        "bucket_bytes": plan.bucket_bytes,
        "buckets": buckets,
        "moved_bytes": sum(row["moved_bytes"] for row in buckets),
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
        findings=[*found.findings, *told], num_compiled=found.num_compiled + len(program.buckets),
    )  # fmt: skip


def _figures(one: SlicedProgram) -> dict[str, Any]:
    """One update program: bytes per device."""
    memory, layout = one.compiled.memory_analysis(), one.plan.layout
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    shape = lambda index: jax.ShapeDtypeStruct(layout.avals[index].shape, one.plan.accumulate_dtype)
    grads = [audit.shard_bytes(shape(index), layout.on_device[index]) for index in one.bucket.params]
    load = computing.load_of(one.plan, one.bucket)
    return {
        "leaves": len(one.members),
        "update": HOST if one.bucket.on_host else DEVICE,
        "moved_bytes": load.out if one.bucket.on_host else load.moved,  # to the device, or to the host: the longer way
        "back_bytes": load.beside if one.bucket.on_host else load.moved,
        "held_bytes": 0 if one.slices or one.bucket.on_host else one.held_bytes,  # of slices: in temp_bytes
        "slices": one.slices.num if one.slices else one.num_rounds,
        "grad_bytes": sum(grads),
        "temp_bytes": int(memory.temp_size_in_bytes) + max(int(beyond), 0),
    }
