"""Compiled steps whose state rests off the device: the gradient program and the buckets' programs, run one after the other."""

from typing import Any

import jax

from jzero.engine import offloaded, programs
from jzero.engine.layout import Layout, Options
from jzero.engine.offloaded import BucketProgram, Carried, Update
from jzero.engine.programs import Program
from jzero.engine.statics import Statics
from jzero.offload.stream import Leaves, Stream
from jzero.step import TrainStep


class StreamedProgram(Program):
    """One step in several programs. `lowered` and `compiled` are the gradient program's."""

    def __init__(
        self, fn: TrainStep, plan: Update, options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...]
    ):  # fmt: skip
        step = offloaded.gradient_step(fn, plan)
        lowered, trace = programs.lower(step, options, plan.rest_layout, statics, batch)
        super().__init__(placed, statics, lowered, trace)
        self.own_layout, self.plan, self.options = plan.rest_layout, plan, options
        self.skips = fn.skip_nonfinite
        self.buckets = [BucketProgram(plan, bucket, options) for bucket in plan.buckets]

    def call(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        """The gradient program is only dispatched when the first two buckets start on their way."""
        plan, old = self.plan, jax.tree.leaves(state)
        rest, (metrics, carried) = self.compiled(plan.rest(state), *batch)
        new = dict(zip(plan.kept, jax.tree.leaves(rest), strict=True)) | {index: old[index] for index in plan.arrays}
        stream = Stream([self._leaves(one, new) for one in self.buckets], self.options.tiers, gives_up=self.options.donate)
        stream.start()
        if self.skips and not bool(carried.proceed):
            stream.cancel()
        else:
            for program, leaves in zip(self.buckets, stream.run(self._update(carried)), strict=True):
                new |= zip(program.members, leaves, strict=True)
        return jax.tree.unflatten(self.layout.treedef, [new[index] for index in range(len(old))]), metrics

    def _leaves(self, program: BucketProgram, state: dict[int, Any]) -> Leaves:
        members = program.members
        return Leaves([state[i] for i in members], program.shardings, [self.layout.places[i] for i in members])

    def _update(self, carried: Carried) -> Any:
        def update(number: int, leaves: list[jax.Array]) -> list[jax.Array]:
            program = self.buckets[number]
            grads = [carried.grads[at] for at in program.param_at]
            new = program.compiled(leaves, grads, carried.shared, carried.early)
            for grad in grads:
                grad.delete()
            return new

        return update
