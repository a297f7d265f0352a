"""`jzero.shard`: any train step under a ZeRO stage, in one line."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax

from jzero import mesh as meshes
from jzero._errors import columns, explain
from jzero._tree import named_leaves, short
from jzero.engine import (
    achieved,
    asked,
    compiler,
    fetching,
    leaves,
    offloaded,
    offloaded_opaque,
    programs,
    reporting,
    resting,
    streamed_report,
    streaming,
)
from jzero.engine.asked import WHO
from jzero.engine.bringing import Bringing
from jzero.engine.layout import Layout, Options, layout
from jzero.engine.programs import Program
from jzero.engine.statics import Statics, split_statics
from jzero.offload.nvme.array import DiskArray
from jzero.report import Report
from jzero.step import TrainState, TrainStep

STEPS: "weakref.WeakSet[ShardedStep]" = weakref.WeakSet()  # that are alive: a checkpoint notes which of them made its state


class ShardedStep:
    """A train step on a mesh. Call it as the step it was made from: `state, aux = step(state, *batch)`; it donates `state`."""

    def __init__(self, fn: Callable[..., Any], options: Options):
        self.fn = fn
        self._options = options
        self._programs: dict[Any, Program] = {}
        self._evaluations: dict[Any, Callable[..., Any]] = {}
        self._plans: dict[Layout, offloaded.Update] = {}
        self._bringings: dict[Layout, Bringing] = {}
        self._recent: dict[Any, Program] = {}  # by batch alone: the fast way in
        self.known: tuple[Layout, Statics] | None = None  # the last state seen: what a checkpoint is restored as
        STEPS.add(self)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"ShardedStep({name}, stage={self._options.stage.number}, mesh={meshes.describe(self._options.mesh)})"

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._options.mesh

    @property
    def stage(self) -> int:
        return self._options.stage.number

    @property
    def options(self) -> Options:
        """What `jzero.shard` was asked for, checked; read-only. `jzero.plan` shards the same step for another mesh by it."""
        return self._options

    def __call__(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        program = self._recent.get(leaves.signature(batch))
        if program is not None:
            try:
                return program(state, *batch)
            except (TypeError, ValueError):
                fresh = self._program(state, *batch)
                if fresh is program:
                    raise
                return fresh(state, *batch)
        program = self._program(state, *batch)
        return program(state, *batch)

    def init(self, make_state: Callable[..., Any], *args: Any) -> Any:
        """`make_state(*args)`, computed so that every leaf is born sharded and none is ever whole on a device.

        Args:
          make_state: returns the state. Traced, so it must not look at values.
          *args: arrays and pytrees of arrays are traced; callables and Python scalars are static.
        """
        dynamic = [index for index, arg in enumerate(args) if not leaves.is_static(arg)]

        def make(traced: list[Any]) -> Any:
            full = list(args)
            for index, value in zip(dynamic, traced, strict=True):
                full[index] = value
            arrays, statics = split_statics(make_state(*full))
            found[:] = [statics]
            return jax.tree.map(leaves.strong, arrays)

        found: list[Statics] = []
        traced = [args[index] for index in dynamic]
        placed = self._layout(jax.eval_shape(make, traced))
        if self._options.moves_state:
            self._check_offload(placed)
            state = resting.init(make, traced, placed, self._options)
        else:
            state = jax.jit(make, out_shardings=placed.tree, compiler_options=compiler.options(self._options.mesh))(traced)
        self.known = placed, found[0]
        return found[0].merge(state)

    def evaluate(self, state: Any, *batch: Any) -> dict[str, Any]:
        """The loss of a batch under the step's mesh, without gradient or update; `state` stays valid. For a `TrainStep`.

        Returns:
          `{"loss", "weight", "aux"}`. A pipeline runs its schedule's forward passes; a loss that takes `rng` gets one key per
          microbatch for the whole batch.
        """
        if not isinstance(self.fn, TrainStep):
            fix = "Shard a step of jzero.make_train_step, or write an evaluation step of your own and shard that."
            raise TypeError(explain(WHO, "only a TrainStep knows its loss", found=[f"got {self.fn!r}"], fix=fix))
        arrays, statics = split_statics(state)
        placed, bringing = self._layout(arrays), None
        if placed.in_files:
            bringing = self._bringing(placed)
            _check_placed(arrays, placed, self._options)
        if self._options.moves_state:  # wherever the optimizer's state is: a loss does not want it
            placed, arrays = placed.without_opt_state(), arrays._replace(opt_state=None)
        key = (*leaves.signature(arrays), statics, *leaves.signature(batch))
        if key not in self._evaluations:
            seen = placed if bringing is None else bringing.layout
            self._evaluations[key] = programs.evaluation(self.fn, self._options, seen, statics, batch)
        if bringing is None:
            return self._evaluations[key](arrays, *batch)
        arrays = bringing.alone(arrays, int(arrays.step))
        found = self._evaluations[key](arrays, *batch)
        bringing.give_up(arrays)
        return found

    def place(self, state: Any) -> Any:
        """A copy of `state` on the mesh; the caller's arrays stay valid, whatever the step donates later."""
        arrays, statics = split_statics(state)
        arrays = jax.tree.map(lambda leaf: leaf if leaves.is_strong(leaf) else leaves.strong(leaf), arrays)
        placed = self._layout(arrays)
        self.known = placed, statics
        self._check_offload(placed)
        copies = resting.placed(jax.tree.leaves(arrays), placed, self._options.tiers)
        return statics.merge(jax.tree.unflatten(placed.treedef, copies))

    def shardings(self, state: Any) -> Any:
        """A pytree of `NamedSharding` like `state` (arrays or `ShapeDtypeStruct`s)."""
        arrays, statics = split_statics(state)
        self.known = self._layout(arrays), statics
        return statics.merge(self.known[0].tree)

    def lower(self, state: Any, *batch: Any) -> jax.stages.Lowered:
        """The step lowered for these shapes, compiled or not; works on a mesh of devices that are only described.

        Of a step whose state rests off the device, the gradient program: `report` has the others.
        """
        arrays, statics = split_statics(state)
        placed = self._layout(arrays)
        if self._options.moves_state:
            return streaming.lower(self.fn, self._plan(placed, statics, batch), self._options, statics, batch)[0]
        return programs.lower(self.fn, self._options, placed, statics, batch)[0]

    def report(self, state: Any, *batch: Any) -> Report:
        """What the compiled step needs and moves, measured beside the stage's formula. Compiles if it must; runs nothing."""
        program = self._program(state, *batch)
        found = reporting.report(self._measured(program), achieved.lines(program.faults), batch, len(self._programs))
        return streamed_report.report(program, found) if isinstance(program, streaming.StreamedProgram) else found

    def _measured(self, program: Program) -> achieved.Subject:
        if program.subject is None:
            fn = programs.with_statics(self.fn, self._options, program.statics) if isinstance(self.fn, TrainStep) else self.fn
            program.subject = reporting.subject(fn, program.own_layout, self._options, program.trace, program.compiled)
        return program.subject

    def _check(self, program: Program) -> list[achieved.Fault]:
        """What the program breaks of its stage's promises: an error, or with `strict=False` a warning for each."""
        found = achieved.faults(self._measured(program))
        if found and self._options.strict:
            raise achieved.error(found, self._options, WHO)
        for line in achieved.lines(found):
            warnings.warn(f"{WHO}: stage {self.stage} {line}", stacklevel=4)
        return found

    def _layout(self, arrays: Any) -> Layout:
        if isinstance(self.fn, TrainStep) and not isinstance(arrays, TrainState):
            fix = "Make it with step.init(train_step.init, make_params, ...), or step.place(train_step.init(params))."
            raise TypeError(explain(WHO, "the state must be a TrainState", found=[f"got {type(arrays).__name__}"], fix=fix))
        return layout(arrays, self._options, opaque=not isinstance(self.fn, TrainStep))

    def _program(self, state: Any, *batch: Any) -> Program:
        """The program for these arguments, checked and compiled if it is new."""
        arrays, statics = split_statics(state)
        key = (*leaves.signature(arrays), statics, *leaves.signature(batch))
        placed = self._programs[key].layout if key in self._programs else self._layout(arrays)
        _check_placed(arrays, placed, self._options)
        if key not in self._programs:
            program = self._new(placed, statics, batch)
            program.faults = self._check(program)
            self._programs[key] = program
        program = self._programs[key]
        self.known = placed, statics
        self._recent[leaves.signature(batch)] = program
        return program

    def _new(self, placed: Layout, statics: Statics, batch: tuple[Any, ...]) -> Program:
        if self._options.moves_state:
            plan = self._plan(placed, statics, batch)
            return streaming.StreamedProgram(self.fn, plan, self._options, placed, statics, batch)
        return Program(placed, statics, *programs.lower(self.fn, self._options, placed, statics, batch))

    def _plan(self, placed: Layout, statics: Statics | None = None, batch: tuple[Any, ...] = ()) -> offloaded.Update:
        """How the update is cut, for one layout; of a step that makes its own, for one batch shape."""
        if not isinstance(self.fn, TrainStep):
            assert statics is not None
            return offloaded_opaque.prepare(self.unsharded(statics), placed, self._options, batch)
        if placed not in self._plans:
            self._plans[placed] = offloaded.prepare(self.fn, placed, self._options)
        return self._plans[placed]

    def _bringing(self, placed: Layout) -> Bringing:
        """How parameters come from files for an evaluation."""
        plan = self._plan(placed)
        if placed not in self._bringings:
            alone = placed.without_opt_state()
            self._bringings[placed] = Bringing(alone, self._options, plan.compute_dtype, plan.bucket_bytes)
        return self._bringings[placed]

    def _check_offload(self, placed: Layout) -> None:
        """What cannot rest where it should, or not be updated there, is refused before anything is made."""
        if self._options.moves_state:
            leaving = fetching.candidates(placed, self._options)
            resting.check(placed, self._options.tiers, self.fn, leaving)
            if isinstance(self.fn, TrainStep):
                self._plan(placed)

    def unsharded(self, statics: Statics) -> Callable[..., Any]:
        """The same step as one device runs it, on a state without its static leaves."""
        return programs.unsharded(self.fn, self._options, statics)


def _check_placed(arrays: Any, placed: Layout, options: Options) -> None:
    """Every leaf that is committed to devices stands where the step wants it."""
    rows = []
    for (path, leaf), sharding, where in zip(named_leaves(arrays), placed.shardings, placed.places, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue  # a shape alone rests nowhere: a report, or a plan
        in_files = where is not None and options.tiers[where].can_fail
        if in_files or isinstance(leaf, DiskArray):
            if not (in_files and options.tiers[where].is_here(leaf, sharding)):
                expected = options.tiers[where].name if in_files else "on the device"
                rows.append([path, short(leaf), _place_of(leaf), f"expected {expected}"])
            continue
        committed = isinstance(leaf, jax.Array) and getattr(leaf, "committed", False)
        if committed and not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            rows.append([path, short(leaf), achieved.place(leaf.sharding), f"expected {achieved.place(sharding)}"])
    if rows:
        problem = f"{len(rows)} of {len(placed.shardings)} state leaves are not where this step keeps them"
        context = f"mesh {meshes.describe(options.mesh)}; stage {options.stage.number}"
        fix = "state = step.place(state), or make it with step.init(make_state, ...)."
        raise ValueError(explain(WHO, problem, found=columns(rows[:20]), context=context, fix=fix))


def _place_of(leaf: Any) -> str:
    return f"in {leaf.swap.folder}" if isinstance(leaf, DiskArray) else "on the device"


def shard(
    fn: Callable[..., Any] | None = None,
    *,
    stage: int,
    mesh: jax.sharding.Mesh | None = None,
    params: Callable[[Any], Any] | None = None,
    rules: Iterable[Any] = (),
    remat: Any = None,
    offload: Any = None,
    schedule: Any = None,
    min_shard_elements: int = 1024,
    on_indivisible: Literal["replicate", "error"] = "replicate",
    donate: bool = True,
    strict: bool = True,
) -> Any:
    """A train step under ZeRO stage 0, 1, 2 or 3. Nothing else changes: not the model, not the optimizer, not the loop.

    With N = size of the mesh axis `data`, Psi parameters, fp32 state and Adam, per device at rest: 12 Psi bytes at
    stage 0, 12 Psi / N from stage 1 on (an opaque step keeps its own parameters whole at 1 and 2). Moved per step: one
    reduction of the gradients at 0 and 1, one per microbatch at 2 and 3; one gather of the parameters at 1 and 2, one at
    each use at 3.

    Args:
      fn: `fn(state, *batch) -> (state, aux)`, or a `TrainStep` of `jzero.make_train_step`. Left out, `shard` is a decorator.
      stage: 0 replicate; 1 shard optimizer state; 2 also gradients; 3 also parameters.
      mesh: any mesh with Auto axes and an axis `data`; None puts all devices on `data`. An axis `replica` repeats the shards;
        `expert` is a second one to shard over, but for leaves that a rule gives it a dim of.
      params: state -> the subtree that is the parameters, where it cannot be found.
      rules: ordered `(regex, PartitionSpec)` or `callable(path, leaf) -> PartitionSpec | None`; the first match wins.
      remat: "none", "full", "dots" or a jax policy, for each layer of jzero's models, or else for the loss as a whole;
        "offload_dots" and "offload:NAME,..." save in host memory.
      offload: a `jzero.Offload`: what rests off the device between its uses (docs/offload.md). A step that makes its own update
        is cut where the optimizer's arrays enter; for it state goes to host memory only.
      schedule: of a `jzero.Pipeline` on a mesh with an axis `pipe`: a name ("1f1b", the default, "gpipe", "interleaved",
        "zb_h1", "breadth_first") or a `jzero.schedules.Schedule`. `accumulate` is its number of microbatches.
      min_shard_elements: smaller leaves stay replicated.
      on_indivisible: "replicate" (and list) leaves that no dim of divides, or "error".
      donate: give the old state's memory to the new one.
      strict: what was asked for and not achieved is an error.

    Returns:
      A `ShardedStep`.

    Raises:
      ValueError, TypeError: bad arguments, a batch that does not divide, roles that cannot be decided, a state elsewhere.
      NotImplementedError: of a step that makes its own update, files, `activations=` or `fetch="use"`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.adam(0.1)
      >>> def train_step(state, x, y):
      ...     params, opt_state = state
      ...     loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return (optax.apply_updates(params, updates), opt_state), loss
      >>> step = shard(train_step, stage=3)
      >>> w = jnp.zeros((64, 32))
      >>> state = step.place((w, tx.init(w)))
      >>> state, loss = step(state, jnp.ones((8, 64)), jnp.ones((8, 32)))
      >>> print(loss)
      1.0

    References:
      Rajbhandari et al., ZeRO, 2020. Zhao et al., PyTorch FSDP, 2023. Zhang et al., MiCS, 2022 (the `replica` axis).
    """
    if fn is None:
        return partial(
            shard, stage=stage, mesh=mesh, params=params, rules=rules, remat=remat, offload=offload, schedule=schedule,
            min_shard_elements=min_shard_elements, on_indivisible=on_indivisible, donate=donate, strict=strict,
        )  # fmt: skip
    if isinstance(fn, ShardedStep):
        found, fix = [repr(fn)], "Shard the step it was made from: jzero.shard(step.fn, stage=...)."
        raise TypeError(explain(WHO, "this step is already sharded", found=found, fix=fix))
    return ShardedStep(
        fn,
        asked.options(
            fn, stage=stage, mesh=mesh, params=params, rules=rules, remat=remat, offload=offload, schedule=schedule,
            min_shard_elements=min_shard_elements, on_indivisible=on_indivisible, donate=donate, strict=strict,
        ),
    )  # fmt: skip
