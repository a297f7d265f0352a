"""Mixture of experts: against every expert computed for every token, on one device and over the mesh axis `expert`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jzero
from jzero import models, moe
from jzero.engine import compiler
from jzero.models import mixtral

QUICK = {"xla_backend_optimization_level": "0"}
B, T, D, F, E, K = 16, 6, 24, 16, 4, 2
RULES = [(r"gate|up|down", PartitionSpec("expert"))]


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    needed = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**needed(mesh), **QUICK})


def make_params(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "dense": (D, D)}
    return {name: jnp.asarray(random.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32) for name, shape in shapes.items()}


def make_x(seed=1):
    return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


def layer(p, x, **options):
    routing = moe.route(x, p["router"], top_k=K)
    return moe.swiglu(x, routing, p["gate"], p["up"], p["down"], **options), routing


def every_expert(p, x):
    """Nothing is sent anywhere: each expert for each token, weighted."""
    routing = moe.route(x, p["router"], top_k=K)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate"])) * jnp.einsum("btd,edf->btef", x, p["up"])
    out = jnp.einsum("btef,efd->bted", hidden, p["down"])
    weights = jnp.sum(jax.nn.one_hot(routing.ids, E) * routing.gates[..., None], axis=2)
    return jnp.einsum("bted,bte->btd", out, weights), routing


def make_loss(run=layer, **options):
    def loss(p, x):
        y, routing = run(p, x @ p["dense"], **options)
        return jnp.mean((y - 1) ** 2) + 0.1 * routing.balance + 0.01 * routing.z

    return loss


def mesh_of(**sizes):
    return jzero.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def sharded(own, sizes, *, stage=3, rules=RULES, params=None):
    step = jzero.shard(own, stage=stage, mesh=mesh_of(**sizes), rules=rules, min_shard_elements=64)
    state = step.place(own.init(make_params() if params is None else params))
    report = step.report(state, make_x())
    state, metrics = step(state, make_x())
    return state, metrics, report


def assert_close(actual, expected, tolerance=1e-5):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    assert max(float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e)) for a, e in pairs) <= tolerance


@pytest.mark.parametrize("capacity_factor", [None, float(E)])  # the second has room for everything
def test_tokens_reach_their_experts(capacity_factor):
    losses = make_loss(capacity_factor=capacity_factor), make_loss(every_expert)
    found, reference = (jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(make_params(), make_x()) for loss in losses)
    assert_close(found, reference)


def choosing(expert, second):
    """A router that sends positive tokens to these two, whatever else they are."""
    columns = np.full((D, E), -1.0)
    columns[:, expert], columns[:, second] = 2.0, 1.0
    return {**make_params(), "router": jnp.asarray(columns, jnp.float32)}


def test_a_capacity_drops_by_position_in_each_example():
    x, p = np.abs(make_x()), choosing(2, 0)
    capacity = moe.capacity_of(0.5, num_tokens=T, top_k=K, num_experts=E)
    assert capacity == 2  # 0.5 x 6 x 2 / 4, rounded up
    y, _ = layer(p, x, capacity_factor=0.5)
    kept, _ = every_expert(p, x)
    np.testing.assert_allclose(y[:, :capacity], kept[:, :capacity], rtol=1e-5, atol=1e-5)
    assert not y[:, capacity:].any()
    alone, _ = layer(p, x[3:4], capacity_factor=0.5)
    np.testing.assert_array_equal(alone[0], y[3])


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("sizes", [None, pytest.param({"expert": 4, "data": 2}, marks=pytest.mark.slow)])
def test_an_expert_that_no_token_chose_gets_no_gradient(sizes, capacity_factor):
    def loss(p, x):
        y, routing = layer(p, jnp.abs(x), capacity_factor=capacity_factor)
        return jnp.mean((y - 1) ** 2) + 0.1 * routing.balance

    own = jzero.make_train_step(loss, optax.sgd(1.0))
    before = {name: leaf for name, leaf in choosing(2, 0).items() if name != "dense"}
    if sizes is None:
        state, metrics = jax.jit(own, compiler_options=QUICK)(own.init(before), make_x())
    else:
        state, metrics, report = sharded(own, sizes, params=before)
        assert report.engine == "composed", report.findings
    assert not metrics["skipped"]
    for name in ("gate", "up", "down"):
        moved = np.abs(np.asarray(state.params[name]) - np.asarray(before[name])).max(axis=(1, 2))
        assert (moved[[1, 3]] == 0).all(), name
        assert (moved[[0, 2]] > 0).all(), name
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params))


def test_the_losses_of_a_router():
    x = np.abs(make_x())
    even = moe.route(x, jnp.zeros((D, E)), top_k=K)
    assert float(even.balance) == pytest.approx(1)
    assert float(even.z) == pytest.approx(np.log(E) ** 2)
    one = moe.route(x, 10 * choosing(2, 0)["router"], top_k=1)
    assert float(one.balance) == pytest.approx(E, rel=1e-4)
    both = moe.route(x, make_params()["router"], top_k=K, gates="all")
    assert (both.gates.sum(-1) < 1).all()
    np.testing.assert_allclose(moe.route(x, make_params()["router"], top_k=K).gates.sum(-1), 1, rtol=1e-6)


def expected(**options):
    own = jzero.make_train_step(make_loss(**options), optax.sgd(0.1), accumulate=2)
    return own, jax.jit(own, compiler_options=QUICK)(own.init(make_params()), make_x())


@pytest.mark.slow
def test_without_rules_the_axis_is_one_more_for_data():
    own, (state, metrics) = expected()
    found, found_metrics, report = sharded(own, {"expert": 2, "data": 2}, rules=())
    assert report.engine == "composed", report.findings
    assert "all-to-all" not in str(report.wire_bytes)
    assert_close(found.params, state.params)
    assert float(found_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


@pytest.mark.slow
def test_experts_that_a_loss_uses_whole_keep_the_global_program():
    def loss(p, x):
        return make_loss()(p, x) + 1e-3 * jnp.sum(p["gate"] ** 2)  # LINE

    own = jzero.make_train_step(loss, optax.sgd(0.1))
    state, _ = jax.jit(own, compiler_options=QUICK)(own.init(make_params()), make_x())
    found, _, report = sharded(own, {"expert": 2, "data": 2})
    assert report.engine == "composed (global)"
    (line,) = [line for line in report.findings if "used whole" in line]
    assert "params/gate is split over the batch's axes and used whole" in line
    assert "test_moe.py" in line
    assert_close(found.params, state.params)


@pytest.mark.slow
def test_a_step_of_the_users_own():
    """The opaque engine: experts find their axis and make it manual themselves."""
    tx = optax.sgd(0.1)

    def own(state, x):
        params, opt_state = state
        value, grads = jax.value_and_grad(make_loss())(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    start = (make_params(), tx.init(make_params()))
    (params, _), value = jax.jit(own, compiler_options=QUICK)(start, make_x())
    step = jzero.shard(own, stage=3, mesh=mesh_of(expert=2, data=2), rules=RULES, min_shard_elements=64)
    state = step.place(start)
    report = step.report(state, make_x())
    assert report.wire_bytes["expert"]["all-to-all"]["measured"] > 0
    (found, _), found_value = step(state, make_x())
    assert_close(found, params)
    assert float(found_value) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.slow
def test_evaluation_over_the_axis():
    own, _ = expected()
    step = jzero.shard(own, stage=2, mesh=mesh_of(expert=2, data=2), rules=RULES, min_shard_elements=64)
    state = own.init(make_params())
    alone = own.evaluate(state, make_x())
    assert float(step.evaluate(step.place(state), make_x())["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_report_knows_what_experts_exchange(precision):
    own = jzero.make_train_step(make_loss(), optax.adam(0.1), precision=precision, accumulate=2)
    _, _, report = sharded(own, {"expert": 4, "data": 2}, stage=2)
    exchanged = report.wire_bytes["expert"]["all-to-all"]
    if precision == "fp32":  # the CPU compiler widens bf16 on the wire
        assert exchanged["measured"] == exchanged["formula"]
    assert not any("nobody asked for" in line for line in report.findings)
    assert any(re.search(r"experts exchange 24 rows for 12 choices", line) for line in report.findings), report.findings
    specs = {leaf["path"]: leaf["spec"] for leaf in report.leaves if leaf["role"] == "params"}
    assert specs["params/gate"] == "P('expert', 'data')"
    assert specs["params/dense"] == "P(None, ('data', 'expert'))"
    moments = [leaf["spec"] for leaf in report.leaves if leaf["role"] == "opt_state" and leaf["path"].endswith("gate")]
    assert set(moments) == {"P('expert', 'data')"}
    for row in report.bytes_at_rest.values():
        assert row["measured"] == row["formula"]


@pytest.mark.slow
def test_no_device_repeats_anothers_work():
    """FLOPs per device: those of one device's run, divided. Dense layers split their batch over data x expert."""
    own = jzero.make_train_step(make_loss(capacity_factor=1.0), optax.sgd(0.1))
    state = jax.eval_shape(lambda: own.init(make_params()))
    flops = {}
    for sizes in ({"data": 1}, {"data": 4}, {"expert": 4, "data": 1}, {"expert": 2, "data": 2}):
        step = jzero.shard(own, stage=1, mesh=mesh_of(**sizes), rules=RULES if "expert" in sizes else (), min_shard_elements=64)
        flops[tuple(sizes.items())] = (
            step.lower(state, jax.ShapeDtypeStruct((B, T, D), jnp.float32)).compile().cost_analysis()["flops"]
        )
    one = flops.pop((("data", 1),))
    assert all(0.9 * one <= 4 * each <= 1.15 * one for each in flops.values()), (one, flops)


def test_bad_input():
    x, p = make_x(), make_params()
    with pytest.raises(ValueError, match=r"a token goes to 1 to 4 of 4 experts\n  top_k=5\nUse 1 to 4"):
        moe.route(x, p["router"], top_k=5)
    for factor in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"a capacity factor is a positive number\n  capacity_factor="):
            layer(p, x, capacity_factor=factor)
    with pytest.raises(ValueError, match="router and weights disagree on the experts"):
        layer({**p, "gate": p["gate"][:3]}, x)
    with pytest.raises(ValueError, match=r"x\[B, T, D\]"):
        moe.route(x[0], p["router"], top_k=1)
    with pytest.raises(ValueError, match=r"a token goes to 1 to 8 experts\n  top_k=9"):
        models.build("mixtral-tiny", top_k=9)
    with pytest.raises(ValueError, match="capacity_factor=0"):
        models.build("mixtral-tiny", capacity_factor=0)


def test_bad_rules_and_meshes():
    own = jzero.make_train_step(make_loss(), optax.sgd(0.1))
    state = jax.eval_shape(lambda: own.init(make_params()))
    three = jzero.shard(own, stage=3, mesh=mesh_of(expert=3, data=2), rules=RULES)
    with pytest.raises(ValueError, match=r"dim 0 has size 4, not a multiple of 3: legal sizes of axis 'expert' are 1, 2, 4"):
        three.shardings(state)
    for twice in (
        PartitionSpec(("expert", "expert")),
        PartitionSpec("expert", "expert"),
        PartitionSpec(("data", "expert"), "data"),
    ):
        step = jzero.shard(own, stage=3, mesh=mesh_of(expert=2, data=2), rules=[("gate", twice)])
        with pytest.raises(ValueError, match=r"axis '(expert|data)' appears 2 times"):
            step.shardings(state)
    pipeline = jzero.Pipeline(embed=lambda p, x: x, layers=lambda p, x: x @ p, head=lambda p, x, _: jnp.mean(x))
    with pytest.raises(NotImplementedError, match="a pipeline has no axis 'expert'"):
        jzero.shard(
            jzero.make_train_step(pipeline, optax.sgd(0.1), accumulate=2), stage=1, mesh=mesh_of(pipe=2, data=1, expert=2)
        )


@pytest.mark.slow
def test_mixtral_trains_over_the_axis():
    model = models.build("mixtral-tiny", num_layers=2, dim=48, num_heads=2, num_kv_heads=2, ffn_dim=24, num_experts=4)
    own = jzero.make_train_step(model.loss, optax.adamw(1e-2))
    step = jzero.shard(own, stage=3, mesh=mesh_of(expert=2, data=2), rules=mixtral.expert_rules)
    state = step.init(own.init, model.init, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 17), np.int32)
    losses = []
    for _ in range(4):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert state.params["layers"]["experts"]["gate"].sharding.spec == PartitionSpec(None, "expert", "data")
