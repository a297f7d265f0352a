"""`Offload(fetch="use")`: which parameters come at their uses, whatever the loss does with them, and that no number changes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero
from jzero._tree import named_leaves

ROWS, WIDTH, LAYERS = 16, 16, 4
MIN_SHARD_ELEMENTS = 64
KEY = jax.random.key(0)


def stacked(*shape):
    return jax.random.normal(KEY, (LAYERS, *shape)) / WIDTH**0.5


def square(*, scale=WIDTH**0.5):
    return jax.random.normal(KEY, (WIDTH, WIDTH)) / scale


def through(layer, x, *layers, length=None):
    return jax.lax.scan(lambda x, w: (layer(x, *w), None), x, layers, length=length)[0]


class Case(NamedTuple):
    loss: object
    params: dict
    come: set  # the parameters that come at their uses
    others: tuple = ()  # what is said of the others


def mean(x):
    return jnp.mean(x.astype(jnp.float32) ** 2)


CASES = {
    "layers in a loop and tables outside": Case(
        lambda p, x: mean(through(lambda x, w, b: jnp.tanh(x @ w + b), x @ p["in"], p["w"], p["b"]) @ p["out"]),
        {"in": square(), "w": stacked(WIDTH, WIDTH), "b": stacked(WIDTH), "out": square()},
        {"in", "w", "b", "out"},
    ),
    "layers written out": Case(
        lambda p, x: mean(jnp.tanh(jnp.tanh(x @ p["0"]) @ p["1"]) @ p["2"]),
        {str(number): square() for number in range(3)},
        {"0", "1", "2"},
    ),
    "turned round behind the loop": Case(
        lambda p, x: mean(through(lambda x, w: jnp.tanh(x @ w.T.reshape(WIDTH, 2, -1).reshape(WIDTH, WIDTH)), x, p["w"])),
        {"w": stacked(WIDTH, WIDTH)},
        {"w"},
    ),
    "turned round before the loop": Case(
        lambda p, x: mean(through(lambda x, w: jnp.tanh(x @ w), x @ p["in"], jnp.swapaxes(p["w"], 1, 2))),
        {"in": square(), "w": stacked(WIDTH, WIDTH)},
        {"in"},
        (("w", "is turned round before its loop"),),
    ),
    "loops in loops": Case(
        lambda p, x: mean(through(lambda x, pair: through(lambda x, w: jnp.tanh(x @ w), x, pair), x, p["w"])),
        {"w": stacked(2, WIDTH, WIDTH)},
        {"w"},
    ),
    "inside a remat region": Case(
        lambda p, x: mean(through(jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w))), x, p["w"])),
        {"w": stacked(WIDTH, WIDTH)},
        {"w"},
    ),
    "tied": Case(
        lambda p, x: mean(through(lambda x, w: jnp.tanh(x @ w), x @ p["table"], p["w"]) @ p["table"].T),
        {"table": square(), "w": stacked(WIDTH, WIDTH)},
        {"w"},
        (("table", "is used more than once"),),
    ),
    "the same in every iteration": Case(
        lambda p, x: mean(through(lambda x, b: jnp.tanh(x @ p["w"] + b), x, p["b"])),
        {"w": square(), "b": stacked(WIDTH)},
        {"b"},
        (("w", "is the same in every iteration of a loop"),),
    ),
    "cut and cast": Case(
        lambda p, x: mean(x[:, :8] @ p["cut"][:8]) + mean(x @ p["cast"].astype(jnp.bfloat16)) + mean(x @ p["w"]),
        {"cut": square(), "cast": square(), "w": square()},
        {"w"},
        (("cut", "is cut or cast before its use"), ("cast", "is cut or cast before its use")),
    ),
    "a custom derivative": Case(
        lambda p, x: mean(jax.nn.relu(optax.projections.projection_non_negative(x @ p["w"]))),
        {"w": square()},
        {"w"},
    ),
    "used by nothing": Case(
        lambda p, x: mean(x @ p["w"]),
        {"w": square(), "idle": square()},
        {"w"},
        (("idle", "is used by nothing"),),
    ),
    "over all examples": Case(
        lambda p, x: jax.nn.logsumexp(jnp.sum((x @ p["w"]) ** 2, axis=1)),
        {"w": square()},
        {"w"},
    ),
}


def make(case, num_devices, *, offload=None, accumulate=2, trainable=None):
    fn = jzero.make_train_step(case.loss, optax.adam(1e-2), accumulate=accumulate, clip_norm=1.0, trainable=trainable)
    mesh = jzero.make_mesh(data=num_devices, devices=jax.devices()[:num_devices])
    step = jzero.shard(fn, stage=3, mesh=mesh, offload=offload, min_shard_elements=MIN_SHARD_ELEMENTS)
    return step, step.place(fn.init(case.params))


def check(case, num_devices, **options):
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    (plain, expected), (step, state) = (
        make(case, num_devices, offload=offload, **options)
        for offload in (None, jzero.Offload(opt_state="host", params="host", fetch="use"))
    )
    for _ in range(2):
        expected, wanted = plain(expected, x)
        state, metrics = step(state, x)
        assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(float(wanted["grad_norm"]), rel=1e-6)
    for (path, leaf), other in zip(named_leaves(expected), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    return step, state, x


SLOW = ("a custom derivative", "used by nothing", "inside a remat region", "turned round behind the loop", "loops in loops")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_what_comes_at_its_use_changes_no_number(name):
    case = CASES[name]
    step, state, x = check(case, 2)
    told = step.report(state, x).findings
    assert f"{len(case.come)} parameters come from host memory at each use, and their gradients leave as they appear" in told
    for path, reason in case.others:
        assert any(line.startswith(f"params/{path} is fetched when a step begins") and reason in line for line in told), told
    (program,) = step._programs.values()
    paths = [program.layout.placements[index].leaf.path for index in program.plan.at_use]
    assert set(paths) == {f"params/{path}" for path in case.come}


@pytest.mark.parametrize(("num_devices", "accumulate"), [(1, 1), (1, 4), (8, 1)])
def test_on_one_device_and_on_eight(num_devices, accumulate):
    check(CASES["layers in a loop and tables outside"], num_devices, accumulate=accumulate)


def test_what_does_not_train_comes_too_and_nothing_leaves():
    case = CASES["layers in a loop and tables outside"]
    step, state, x = check(case, 2, trainable=lambda path: path in ("out", "b"))
    figures = step.report(state, x).offload
    trained, every = (4 * sum(case.params[name].size for name in names) // 2 for names in (("out", "b"), case.params))
    assert figures["grads_in_host_bytes"] == trained
    assert figures["left_bytes"] == 2 * trained
    once = 4 * (case.params["out"].size + case.params["b"].size) // 2  # the program's last use, and what is only added
    assert figures["fetched_bytes"] == 2 * (2 * every - once + trained)


def test_gradients_are_in_host_memory_and_no_parameter_is_whole_on_the_device():
    step, state, x = check(CASES["layers in a loop and tables outside"], 2)
    (program,) = step._programs.values()
    _, (_, carried) = program.compiled(program.plan.rest(state), x)
    assert {grad.sharding.memory_kind for grad in carried.grads} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"pinned_host"}


def test_replicas_leave_nothing_to_come():
    case = CASES["layers in a loop and tables outside"]
    fn = jzero.make_train_step(case.loss, optax.adam(1e-2))
    mesh = jzero.make_mesh(replica=2, data=2, devices=jax.devices()[:4])
    offload = jzero.Offload(params="host", fetch="use")
    step = jzero.shard(fn, stage=3, mesh=mesh, offload=offload, min_shard_elements=MIN_SHARD_ELEMENTS)
    state = jax.eval_shape(lambda: fn.init(case.params))
    with pytest.raises(ValueError, match=r"no parameter can come at its use(.|\n)*add up its gradient once a step"):
        step.report(state, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))


def test_the_evaluation_fetches_all_of_it():
    step, state, x = check(CASES["tied"], 2)
    assert float(step.evaluate(state, x)["loss"]) == pytest.approx(float(step(state, x)[1]["loss"]), rel=1e-6)
