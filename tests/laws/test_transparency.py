"""Transparency: the pass changes no value and no gradient, whatever the program does.

Every program of the table runs sharded and unsharded from one state. The optimizer is SGD with momentum: its trace is zero
before the first step and exactly the gradient after it.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

import jzero
from jzero.engine import compiler

TX = optax.sgd(1.0, momentum=0.9)
TOLERANCE = 1e-5  # relative L2 of each leaf
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the compile time


class Way(NamedTuple):
    """How a program is sharded; `engine` is the `reduction` of jzero's own step, or "opaque"."""

    engine: str
    stage: int
    num_shards: int

    def mesh(self, tensor: int = 1) -> jax.sharding.Mesh:
        data = min(self.num_shards, len(jax.devices()) // tensor)
        return jzero.make_mesh(data=data, tensor=tensor, devices=jax.devices()[: data * tensor])


MANUAL = [Way("auto", *rest) for rest in itertools.product((2, 3), (8, 3))]
GLOBAL = [Way("global", *rest) for rest in itertools.product((3, 2), (3, 8))]
OPAQUE = [Way("opaque", *rest) for rest in itertools.product((3, 1), (8, 3))]


def ways(name: str, index: int) -> tuple[list[Way], list[Way]]:
    """The ways of one loss that `make test` goes, and those left to `make test-all`. Neighbours in the table go different ways."""
    loss = programs.LOSSES[name]
    manual = [] if loss.meets else [MANUAL[index % 2], MANUAL[3 - index % 2]]
    chosen = [*manual, GLOBAL[index % 4], *([OPAQUE[0 if index % 3 else index % 4]] if loss.opaque else [])]
    every = [*MANUAL, *([] if loss.meets else GLOBAL), *(OPAQUE if loss.opaque else [])]
    return chosen, [way for way in every if way not in chosen]


@pytest.fixture(autouse=True)
def unoptimised(monkeypatch):
    options = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**options(mesh), **UNOPTIMISED})


def own_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The step that a user would write."""

    def train_step(state: Any, x: Any, t: Any) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, x, t)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return train_step


def unsharded(fn: Callable[..., Any], state: Any, *batch: Any) -> Any:
    """`fn` as plain JAX runs it; what is no array is closed over."""
    arrays, rest = eqx.partition(state, eqx.is_array_like)

    def on_arrays(arrays: Any, *batch: Any) -> Any:
        state, aux = fn(eqx.combine(arrays, rest), *batch)
        return eqx.filter(state, eqx.is_array_like), aux

    return jax.device_get(jax.jit(on_arrays, compiler_options=UNOPTIMISED)(arrays, *batch))


def sharded(step: Any, state: Any, *batch: Any) -> Any:
    state, aux = step(step.place(state), *batch)
    arrays = eqx.filter(state, eqx.is_array_like)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(arrays)), "nothing is sharded: the test tests nothing"
    return jax.device_get((arrays, aux))


def assert_same(actual: Any, expected: Any, tolerance: float = TOLERANCE, message: str = "") -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    errors = {jax.tree_util.keystr(path): difference(old, new) for (path, old), new in pairs}
    wrong = {path: error for path, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{message}: relative differences {wrong}"


def difference(expected: Any, actual: Any) -> float:
    left, right = (np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf, np.float64) for leaf in (expected, actual))
    return float(np.linalg.norm(left - right) / (np.linalg.norm(left) or 1.0))


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def check_loss(name: str, way: Way, expected: dict[str, Any]) -> None:
    loss = programs.LOSSES[name]
    mesh = way.mesh(loss.tensor)
    fn = partial(loss.fn, mesh=mesh) if loss.on_mesh else loss.fn
    options = {"stage": way.stage, "mesh": mesh, "min_shard_elements": 16}
    if way.engine == "opaque":
        state = (loss.params(), TX.init(loss.params()))
        (_, opt_state), value = sharded(jzero.shard(own_step(fn), **options), state, *programs.batch())
    else:
        train_step = jzero.make_train_step(fn, TX, trainable=loss.trains, reduction=way.engine)
        step = jzero.shard(train_step, **options)
        state = train_step.init(loss.params())
        engine = step.report(state, *programs.batch()).engine
        assert engine == ("composed" if way.engine == "auto" and not loss.meets else "composed (global)"), way
        state, metrics = sharded(step, state, *programs.batch())
        opt_state, value = state.opt_state, metrics["loss"]
    assert_same({"gradient": jax.tree.leaves(opt_state), "loss": value}, expected, loss.tolerance, f"{name}, {way}")


def gradient_of(name: str) -> dict[str, Any]:
    """The gradient and the loss of the whole batch, by plain JAX."""
    loss = programs.LOSSES[name]
    fn = partial(loss.fn, mesh=Way("auto", 3, 8).mesh(loss.tensor)) if loss.on_mesh else loss.fn
    params = loss.params()
    trains = lambda path, leaf: eqx.is_inexact_array_like(leaf) and (loss.trains is None or loss.trains(path[0].key))
    diff, rest = eqx.partition(params, jax.tree_util.tree_map_with_path(trains, params))
    grad = jax.jit(jax.value_and_grad(lambda diff, x, t: fn(eqx.combine(diff, rest), x, t)), compiler_options=UNOPTIMISED)
    value, gradient = jax.device_get(grad(diff, *programs.batch()))
    return {"gradient": jax.tree.leaves(gradient), "loss": value}


@pytest.mark.parametrize("name", programs.LOSSES)
def test_a_loss(name):
    chosen, _ = ways(name, list(programs.LOSSES).index(name))
    expected = gradient_of(name)
    for way in chosen:
        check_loss(name, way, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", programs.LOSSES)
def test_a_loss_in_every_other_way(name):
    _, others = ways(name, list(programs.LOSSES).index(name))
    expected = gradient_of(name)
    for way in others:
        check_loss(name, way, expected)
