"""Compiled steps: which engine makes one, how it is lowered, and what happens when it is called."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import jax

import pallas_kernels
from jzero import remat as remats
from jzero import watch
from jzero._errors import explain
from jzero._tree import short
from jzero.engine import achieved, compiler, composed, fetching, leaves, opaque, pipelined
from jzero.engine.asked import WHO
from jzero.engine.layout import Layout, Options, Trace, batch_shardings
from jzero.engine.statics import Statics, split_statics
from jzero.step import TrainStep


class Program:
    """One compiled step: for one state structure and one batch shape."""

    def __init__(self, layout: Layout, statics: Statics, lowered: Any, trace: Trace):
        self.layout, self.statics, self.lowered, self.trace = layout, statics, lowered, trace
        self.own_layout = layout  # of what `compiled` takes
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
            return self.call(state, *batch)
        arrays, statics = split_statics(state)
        if statics != self.statics:
            raise TypeError("static leaves changed")
        arrays, aux = self.call(arrays, *batch)
        return statics.merge(arrays), aux

    def call(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        """The step on arrays alone."""
        return self.compiled(state, *batch)


def lower(
    fn: Callable[..., Any], options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...], *,
    keeps_params: bool = False, aux_shardings: Any = None,
) -> tuple[jax.stages.Lowered, Trace]:  # fmt: skip
    """The step by the engine that is its own, lowered for one layout and batch shape.

    `keeps_params`: the state that comes in stays valid, and the one that goes out has no parameters (a gradient program).
    `aux_shardings`: of what comes out beside the state, a prefix; None is for the compiler to say.
    """
    traces: list[Trace] = []
    if options.schedule is not None:
        assert isinstance(fn, TrainStep)
        _check_no_statics(statics)
        inner, accumulate = pipelined.build(fn, placed, options, traces), fn.accumulate
    elif isinstance(fn, TrainStep):
        inner, accumulate = composed.build(with_statics(fn, options, statics), placed, options, traces), fn.accumulate
    else:
        inner, accumulate = opaque.build(unsharded(fn, options, statics), placed, options, traces), 1
    in_shardings = (placed.tree, *batch_shardings(batch, options.mesh, accumulate))

    def step(state: Any, *batch: Any) -> tuple[Any, Any]:
        state, aux = inner(state, *batch)
        state = state._replace(params=None) if keeps_params else state
        return jax.tree.map(leaves.strong, state), aux

    donate = (0,) if options.donate and not keeps_params else ()
    tree = placed.tree._replace(params=None) if keeps_params else placed.tree
    jitted = jax.jit(
        step, in_shardings=in_shardings, out_shardings=(tree, aux_shardings), donate_argnums=donate,
        keep_unused=True,  # a state leaf that the step ignores is still state: placed, donated and reported
        compiler_options=compiler.options(options.mesh),
    )  # fmt: skip
    fetches = fetching.is_asked(options) or (not isinstance(fn, TrainStep) and any(placed.places))
    abstract = jax.tree.unflatten(placed.treedef, placed.typed if fetches else placed.avals)
    with (
        pallas_kernels.target(options.mesh.devices.flat[0].device_kind, options.mesh.size),
        pallas_kernels.recording() as choices,
    ):
        lowered = jitted.lower(abstract, *batch)
    traces[0].choices = tuple(choices)
    traces[0].kept = len(jax.tree.leaves(placed.tree.params)) if keeps_params else 0
    return lowered, traces[0]


def evaluation(fn: TrainStep, options: Options, placed: Layout, statics: Statics, batch: tuple[Any, ...]) -> Callable[..., Any]:
    """`(state, *batch) -> metrics` without gradient or update, jitted."""
    step = with_statics(fn, options, statics)
    if options.schedule is not None:
        run = pipelined.build_evaluation(fn, placed, options)
    else:
        stepped = opaque.build(lambda state, *batch: (state, step.evaluate(state, *batch)), placed, options, [])
        run = lambda state, *batch: stepped(placed.fetched(state), *batch)[1]
    in_shardings = (placed.tree, *batch_shardings(batch, options.mesh, step.accumulate))
    return jax.jit(run, in_shardings=in_shardings, compiler_options=compiler.options(options.mesh))


def unsharded(fn: Callable[..., Any], options: Options, statics: Statics) -> Callable[..., Any]:
    """The same step as one device runs it, on a state without its static leaves."""
    return with_statics(fn, options, statics) if isinstance(fn, TrainStep) else _on_arrays(fn, statics)


def with_statics(step: TrainStep, options: Options, statics: Statics) -> TrainStep:
    """The composed step with what only sharding knows: the remat policy, and static leaves that the loss wants back."""
    policy = options.remat
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
