"""Compiled steps whose state rests off the device: the gradient program and the buckets' programs, run one after the other."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jzero.engine import composed, fetching, offloaded, programs
from jzero.engine.bringing import Bringing
from jzero.engine.by_slices import SlicedProgram
from jzero.engine.layout import Layout, Options, Trace
from jzero.engine.offloaded import Carried, Update
from jzero.engine.offloaded_opaque import OpaqueUpdate
from jzero.engine.programs import Program, with_statics
from jzero.engine.statics import Statics, split_statics
from jzero.offload.stream import Leaves, Stream
from jzero.step import TrainStep


class StreamedProgram(Program):
    """One step in several programs. `lowered` and `compiled` are the gradient program's."""

    def __init__(
        self, fn: Any, plan: Update, options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...]
    ):  # fmt: skip
        self.keeps = keeps(options)
        lowered, trace, plan = lower(fn, plan, options, statics, batch)
        super().__init__(placed, statics, lowered, trace)
        self.own_layout, self.plan, self.options = plan.rest_layout, plan, options
        self.skips = isinstance(fn, TrainStep) and fn.skip_nonfinite
        self.accumulate = fn.accumulate if isinstance(fn, TrainStep) else 1
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
            grads = [carried.grads[at] for at in program.grad_at]
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
    fn: Any, plan: Update, options: Options, statics: Statics, batch: tuple[Any, ...]
) -> tuple[Any, Trace, Update]:  # fmt: skip
    """The gradient program, lowered; and the update as that program leaves it to do."""
    if isinstance(plan, OpaqueUpdate):
        return *_lower_opaque(plan, options, batch), plan
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


def _lower_opaque(plan: OpaqueUpdate, options: Options, batch: tuple[Any, ...]) -> tuple[Any, Trace]:
    """The first part of a step that was cut: a step of its own, without static leaves."""
    layout = plan.rest_layout
    _, no_statics = split_statics(list(layout.avals))
    lowered, trace = programs.lower(
        plan.first, options, layout, no_statics, batch, aux_shardings=(None, plan.carried_shardings)
    )  # fmt: skip
    trace.to_shards, trace.choices = plan.reduced_to_shards, plan.choices
    return lowered, trace


def _let_go(old: list[Any], new: dict[int, Any]) -> None:
    """Give up the leaves of the old state that the new one does not share: as donation would have, but after the step."""
    for index, leaf in enumerate(old):
        if isinstance(leaf, jax.Array) and leaf is not new[index]:
            leaf.delete()
