"""`jzero.shard`: any train step under a ZeRO stage, in one line."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Literal

import jax
import jax.numpy as jnp

import pallas_kernels
from jzero import mesh as meshes
from jzero import remat as remats
from jzero import watch
from jzero._errors import columns, explain
from jzero._tree import named_leaves, short
from jzero.engine import achieved, asked, compiler, composed, opaque, pipelined, reporting
from jzero.engine.asked import WHO
from jzero.engine.layout import Layout, Options, Trace, batch_shardings, layout
from jzero.engine.statics import Statics, split_statics
from jzero.report import Report
from jzero.step import TrainState, TrainStep


class _Program:
    """One compiled step: for one state structure and one batch shape."""

    def __init__(self, layout: Layout, statics: Statics, lowered: Any, trace: Trace):
        self.layout, self.statics, self.lowered, self.trace = layout, statics, lowered, trace
        self.compiled = lowered.compile()
        self.subject: achieved.Subject | None = None  # what the compiler made of it, measured once
        self.faults: list[achieved.Fault] = []  # promises of the stage that it breaks
        self.is_compared = jax.process_count() == 1  # with what the other processes run
        self.watch = watch.from_environment()

    def __call__(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        if not self.is_compared:
            watch.compare_programs(self.lowered.as_text(), ", ".join(short(leaf) for leaf in jax.tree.leaves(batch)))
            self.is_compared = True
        if self.watch is None:
            return self._run(state, *batch)
        self.watch.begin()
        try:
            state, aux = self._run(state, *batch)
        except BaseException:
            self.watch.failed()
            raise
        self.watch.called(aux)
        return state, aux

    def _run(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        if not self.statics:
            return self.compiled(state, *batch)
        arrays, statics = split_statics(state)
        if statics != self.statics:
            raise TypeError("static leaves changed")
        arrays, aux = self.compiled(arrays, *batch)
        return statics.merge(arrays), aux


STEPS: "weakref.WeakSet[ShardedStep]" = weakref.WeakSet()  # that are alive: a checkpoint notes which of them made its state


class ShardedStep:
    """A train step on a mesh. Call it as the step it was made from: `state, aux = step(state, *batch)`; it donates `state`."""

    def __init__(self, fn: Callable[..., Any], options: Options):
        self.fn = fn
        self._options = options
        self._programs: dict[Any, _Program] = {}
        self._evaluations: dict[Any, Callable[..., Any]] = {}
        self._recent: dict[Any, _Program] = {}  # by batch alone: the fast way in
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
        program = self._recent.get(_signature(batch))
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
        dynamic = [index for index, arg in enumerate(args) if not _is_static(arg)]

        def make(traced: list[Any]) -> Any:
            full = list(args)
            for index, value in zip(dynamic, traced, strict=True):
                full[index] = value
            arrays, statics = split_statics(make_state(*full))
            found[:] = [statics]
            return jax.tree.map(_strong, arrays)

        found: list[Statics] = []
        traced = [args[index] for index in dynamic]
        placed = self._layout(jax.eval_shape(make, traced))
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
        key = (*_signature(arrays), statics, *_signature(batch))
        if key not in self._evaluations:
            self._evaluations[key] = self._evaluation(self._layout(arrays), statics, batch)
        return self._evaluations[key](arrays, *batch)

    def _evaluation(self, placed: Layout, statics: Statics, batch: tuple[Any, ...]) -> Callable[..., Any]:
        options, step = self._options, self._train_step(statics)
        if options.schedule is not None:
            assert isinstance(self.fn, TrainStep)
            run = pipelined.build_evaluation(self.fn, placed, options)
        else:
            stepped = opaque.build(lambda state, *batch: (state, step.evaluate(state, *batch)), placed, options, [])
            run = lambda state, *batch: stepped(state, *batch)[1]
        in_shardings = (placed.tree, *batch_shardings(batch, options.mesh, step.accumulate))
        return jax.jit(run, in_shardings=in_shardings, compiler_options=compiler.options(options.mesh))

    def place(self, state: Any) -> Any:
        """A copy of `state` on the mesh; the caller's arrays stay valid, whatever the step donates later."""
        arrays, statics = split_statics(state)
        arrays = jax.tree.map(lambda leaf: leaf if _is_strong(leaf) else _strong(leaf), arrays)
        placed = self._layout(arrays)
        self.known = placed, statics
        copies = [_copy(leaf, sharding) for leaf, sharding in zip(jax.tree.leaves(arrays), placed.shardings, strict=True)]
        return statics.merge(jax.tree.unflatten(placed.treedef, copies))

    def shardings(self, state: Any) -> Any:
        """A pytree of `NamedSharding` like `state` (arrays or `ShapeDtypeStruct`s)."""
        arrays, statics = split_statics(state)
        self.known = self._layout(arrays), statics
        return statics.merge(self.known[0].tree)

    def lower(self, state: Any, *batch: Any) -> jax.stages.Lowered:
        """The step lowered for these shapes, compiled or not; works on a mesh of devices that are only described."""
        arrays, statics = split_statics(state)
        return self._lower(self._layout(arrays), statics, batch)[0]

    def report(self, state: Any, *batch: Any) -> Report:
        """What the compiled step needs and moves, measured beside the stage's formula. Compiles if it must; runs nothing."""
        program = self._program(state, *batch)
        return reporting.report(self._measured(program), achieved.lines(program.faults), batch, len(self._programs))

    def _measured(self, program: _Program) -> achieved.Subject:
        if program.subject is None:
            fn = self._train_step(program.statics) if isinstance(self.fn, TrainStep) else self.fn
            program.subject = reporting.subject(fn, program.layout, self._options, program.trace, program.compiled)
        return program.subject

    def _check(self, program: _Program) -> list[achieved.Fault]:
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

    def _program(self, state: Any, *batch: Any) -> _Program:
        """The program for these arguments, checked and compiled if it is new."""
        arrays, statics = split_statics(state)
        key = (*_signature(arrays), statics, *_signature(batch))
        placed = self._programs[key].layout if key in self._programs else self._layout(arrays)
        _check_placed(arrays, placed, self._options)
        if key not in self._programs:
            lowered, trace = self._lower(placed, statics, batch)
            program = _Program(placed, statics, lowered, trace)
            program.faults = self._check(program)
            self._programs[key] = program
        program = self._programs[key]
        self.known = placed, statics
        self._recent[_signature(batch)] = program
        return program

    def _lower(self, placed: Layout, statics: Statics, batch: tuple[Any, ...]) -> tuple[jax.stages.Lowered, Trace]:
        options, traces = self._options, []
        if options.schedule is not None:
            assert isinstance(self.fn, TrainStep)
            _check_no_statics(statics)
            inner, accumulate = pipelined.build(self.fn, placed, options, traces), self.fn.accumulate
        elif isinstance(self.fn, TrainStep):
            inner, accumulate = composed.build(self._train_step(statics), placed, options, traces), self.fn.accumulate
        else:
            inner, accumulate = opaque.build(self.unsharded(statics), placed, options, traces), 1
        in_shardings = (placed.tree, *batch_shardings(batch, options.mesh, accumulate))

        def step(state: Any, *batch: Any) -> tuple[Any, Any]:
            state, aux = inner(state, *batch)
            return jax.tree.map(_strong, state), aux

        donate = (0,) if options.donate else ()
        jitted = jax.jit(
            step, in_shardings=in_shardings, out_shardings=(placed.tree, None), donate_argnums=donate,
            keep_unused=True,  # a state leaf that the step ignores is still state: placed, donated and reported
            compiler_options=compiler.options(options.mesh),
        )  # fmt: skip
        abstract = jax.tree.unflatten(placed.treedef, placed.avals)
        with pallas_kernels.target(options.mesh.devices.flat[0].device_kind), pallas_kernels.recording() as choices:
            lowered = jitted.lower(abstract, *batch)
        traces[0].choices = tuple(choices)
        return lowered, traces[0]

    def unsharded(self, statics: Statics) -> Callable[..., Any]:
        """The same step as one device runs it, on a state without its static leaves."""
        return self._train_step(statics) if isinstance(self.fn, TrainStep) else _on_arrays(self.fn, statics)

    def _train_step(self, statics: Statics) -> TrainStep:
        """The composed step with what only sharding knows: the remat policy, and static leaves that the loss wants back."""
        step, policy = self.fn, self._options.remat
        assert isinstance(step, TrainStep)
        if statics:
            _, inside = split_statics(jax.tree.unflatten(statics.treedef, statics.full(0)).params)
            step = replace(step, trainable=inside.strip(step.trainable)).with_loss(lambda loss: _given(loss, inside))
        return step if policy is None else step.with_loss(lambda loss: remats.apply(loss, policy))


def _check_no_statics(statics: Statics) -> None:
    if statics:
        found = [f"{len(statics.leaves)} leaves, the first is {statics.leaves[0][1]!r}"]
        fix = "Keep functions and flags out of params: close over them in embed, layers and head."
        raise TypeError(explain(WHO, "every leaf of a pipeline's state is an array", found=found, fix=fix))


def _given(loss: Callable[..., Any], statics: Statics) -> Callable[..., Any]:
    @wraps(loss)
    def with_statics(params: Any, *args: Any, **kwargs: Any) -> Any:
        return loss(statics.merge(params), *args, **kwargs)

    return with_statics


def _on_arrays(fn: Callable[..., Any], statics: Statics) -> Callable[..., Any]:
    """`fn` on a state without its static leaves."""
    if not statics:
        return fn

    def on_arrays(arrays: Any, *batch: Any) -> Any:
        out = fn(statics.merge(arrays), *batch)
        return (split_statics(out[0])[0], *out[1:]) if isinstance(out, tuple) and out else out

    return on_arrays


def _signature(tree: Any) -> tuple[Any, ...]:
    """Structure, shapes and dtypes, as a key."""
    leaves, treedef = jax.tree.flatten(tree)
    return (treedef, *[(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else ((), type(leaf)) for leaf in leaves])


def _is_strong(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not getattr(leaf, "weak_type", False)


def _strong(leaf: Any) -> Any:
    """A leaf whose dtype is fixed: a weak one would compile the next call anew."""
    leaf = jnp.asarray(leaf)  # a Python scalar's array is weak
    return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def _copy(leaf: Any, sharding: Any) -> jax.Array:
    """`may_alias=False` from one device to a replicated sharding keeps the caller's buffer as one piece (jax 0.11.2)."""
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1:
        leaf = jax.device_put(leaf, leaf.sharding, may_alias=False) if sharding.is_fully_replicated else leaf
    return jax.device_put(leaf, sharding, may_alias=False)


def _is_static(arg: Any) -> bool:
    """Callables and Python scalars; an equinox module can be called too, but has arrays in it."""
    if arg is None or isinstance(arg, bool | int | float | complex | str):
        return True
    leaves = jax.tree.leaves(arg)
    return callable(arg) and not any(hasattr(leaf, "dtype") for leaf in leaves)


def _check_placed(arrays: Any, placed: Layout, options: Options) -> None:
    """Every leaf that is committed to devices stands where the step wants it."""
    rows = []
    for (path, leaf), sharding in zip(named_leaves(arrays), placed.shardings, strict=True):
        committed = isinstance(leaf, jax.Array) and getattr(leaf, "committed", False)
        if committed and not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            rows.append([path, short(leaf), achieved.place(leaf.sharding), f"expected {achieved.place(sharding)}"])
    if rows:
        problem = f"{len(rows)} of {len(placed.shardings)} state leaves are not where this step keeps them"
        context = f"mesh {meshes.describe(options.mesh)}; stage {options.stage.number}"
        fix = "state = step.place(state), or make it with step.init(make_state, ...)."
        raise ValueError(explain(WHO, problem, found=columns(rows[:20]), context=context, fix=fix))


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
      mesh: any mesh with Auto axes and an axis `data`; None puts all devices on `data`. An axis `replica` repeats the shards.
      params: state -> the subtree that is the parameters, where it cannot be found.
      rules: ordered `(regex, PartitionSpec)` or `callable(path, leaf) -> PartitionSpec | None`; the first match wins.
      remat: "none", "full", "dots" or a jax policy, for each layer of jzero's models, or else for the loss as a whole.
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
      NotImplementedError: `offload=`, until it exists.

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
