"""Planted faults: a stage that was asked for and not achieved is an error that names the leaf or the line."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jzero
from jzero import comm as comms
from jzero.engine import opaque as opaque_engine

TX = optax.adamw(1e-3)
LAYERS, WIDTH, ROWS, LENGTH = 4, 48, 32, 8
NOWHERE = PartitionSpec()


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    stack = lambda key, *shape: jax.random.normal(key, (LAYERS, *shape)) / 8
    return {"up": stack(keys[0], WIDTH, 2 * WIDTH), "down": stack(keys[1], 2 * WIDTH, WIDTH), "out": jnp.ones((WIDTH, 96))}


def loss(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = lax.scan(layer, x, {"up": p["up"], "down": p["down"]})
    return jnp.mean((h @ p["out"]) ** 2)


def own_step(state, x, loss=loss):
    p, opt_state = state
    value, grads = jax.value_and_grad(loss)(p, x)
    updates, opt_state = TX.update(grads, opt_state, p)
    return (optax.apply_updates(p, updates), opt_state), value


def described(fn, *, stage, mesh=None, **options):
    """A step and shapes enough to compile it."""
    step = jzero.shard(fn, stage=stage, mesh=mesh, **options)
    p = jax.eval_shape(params)
    is_own = isinstance(fn, jzero.TrainStep)
    state = jax.eval_shape(fn.init, p) if is_own else (p, jax.eval_shape(TX.init, p))
    return step, state, jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)


def h100():
    return jzero.make_mesh(devices=jzero.topology("h100:1x8"))


def v5e():
    return jzero.make_mesh(devices=jzero.topology("v5e:4x2"))


TARGETS = {"cpu": lambda: None, "h100": h100, "v5e": v5e}
CPU, H100, V5E = "cpu", *(pytest.param(name, marks=pytest.mark.compile) for name in ("h100", "v5e"))


def caught(step, state, x):
    with pytest.raises(jzero.StageNotAchieved) as error:
        step.report(state, x)
    return str(error.value)


STEPS = {"own": own_step, "jzero": jzero.make_train_step(loss, TX, precision="bf16", accumulate=2)}
QUICK = {("h100", 3, "own"), ("h100", 1, "jzero"), ("v5e", 3, "jzero"), ("v5e", 2, "own")}


def everywhere():
    for target, stage, name in itertools.product(TARGETS, range(4), STEPS):
        marks = [pytest.mark.compile] if target != "cpu" else []
        marks += [pytest.mark.slow] if target != "cpu" and (target, stage, name) not in QUICK else []
        yield pytest.param(target, stage, STEPS[name], marks=marks, id=f"{target}-{stage}-{name}")


@pytest.mark.parametrize(("target", "stage", "fn"), list(everywhere()))
def test_what_is_achieved_is_no_error(target, stage, fn):
    step, state, x = described(fn, stage=stage, mesh=TARGETS[target]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = step.report(state, x)
    assert not any("not achieved" in line for line in report.findings)


@pytest.mark.parametrize("target", [CPU, H100, V5E])
def test_sharded_inputs_without_the_pass(monkeypatch, target):
    plain = lambda jaxpr, facts, args, **_: jax.extend.core.jaxpr_as_fun(jaxpr)(*args)
    monkeypatch.setattr(opaque_engine, "constrained", plain)
    message = caught(*described(own_step, stage=3, mesh=TARGETS[target]()))
    assert "stage 3 was not achieved" in message


@pytest.mark.parametrize("target", [CPU, H100])
def test_a_constraint_that_replicates_a_parameter(target):
    mesh = TARGETS[target]()
    whole = NamedSharding(mesh or jzero.make_mesh(), NOWHERE)

    def careless(p, x):
        return loss({**p, "out": lax.with_sharding_constraint(p["out"], whole)}, x)  # LINE

    message = caught(*described(lambda state, x: own_step(state, x, careless), stage=3, mesh=mesh))
    assert "parameters are gathered outside their use" in message
    assert "0/out   replicated by the constraint at" in message
    assert "test_achieved.py" in message


@pytest.mark.parametrize("target", [CPU, H100])
def test_a_gather_hoisted_out_of_the_scan(monkeypatch, target):
    """The pass gathers stacks where they stand before the loop, and takes what comes of it for no shard."""
    real = opaque_engine.constrained

    def hoisted(jaxpr, facts, args, **options):
        stacks = [bool(fact) and arg.ndim == 3 for fact, arg in zip(facts, args, strict=True)]
        every = zip(stacks, facts, args, strict=True)
        args = [options["comm"].gather(arg, fact.split) if stack else arg for stack, fact, arg in every]
        return real(jaxpr, [None if stack else fact for stack, fact in zip(stacks, facts, strict=True)], args, **options)

    monkeypatch.setattr(opaque_engine, "constrained", hoisted)
    message = caught(*described(own_step, stage=3, mesh=TARGETS[target]()))
    assert "all its layers at once: all-gather" in message


@pytest.mark.parametrize("target", [CPU, H100, V5E])
def test_accumulation_reduced_in_every_microbatch(target):
    def accumulating(state, x):
        p, opt_state = state

        def one(total, rows):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(p, rows)), None

        grads, _ = lax.scan(one, jax.tree.map(jnp.zeros_like, p), x.reshape(8, 4, LENGTH, WIDTH).swapaxes(0, 1))
        updates, opt_state = TX.update(grads, opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), None

    mesh = TARGETS[target]()
    message = caught(*described(accumulating, stage=1, mesh=mesh))
    assert "gradients are reduced in a loop" in message
    assert "accumulate=k" in message
    step, state, x = described(accumulating, stage=2, mesh=mesh)  # which promises no less than a reduction each
    step.report(state, x)


def test_a_leaf_that_is_not_donated(monkeypatch):
    real = jax.jit
    monkeypatch.setattr(jax, "jit", lambda fn, **options: real(fn, **{**options, "donate_argnums": ()}))
    message = caught(*described(own_step, stage=3))
    assert "10 state leaves are not donated" in message
    assert "0/up   float32[4,48,96]" in message


@pytest.mark.compile
def test_a_gather_in_fp32_where_bf16_was_asked_for(monkeypatch):
    real = comms.Manual.gather

    def wide(self, shard, split):  # the barrier stops the compiler from moving the cast behind the gather
        return real(self, lax.optimization_barrier(shard.astype(jnp.float32)), split).astype(shard.dtype)

    monkeypatch.setattr(comms.Manual, "gather", wide)
    fn = jzero.make_train_step(loss, TX, precision="bf16")
    message = caught(*described(fn, stage=1, mesh=h100()))
    assert "parameters are gathered wider than bfloat16" in message


@pytest.mark.compile
def test_a_cast_to_fp32_before_the_use_travels_in_bf16():
    widening = lambda p, x: loss({**p, "out": p["out"].astype(jnp.float32)}, x)
    fn = jzero.make_train_step(widening, TX, precision="bf16")
    step, state, x = described(fn, stage=3, mesh=h100())
    row = step.report(state, x).wire_bytes["data"]["all-gather"]
    assert row["measured"] == pytest.approx(row["formula"], rel=0.05)


@pytest.mark.compile
def test_a_vector_in_fp32_beside_matrices_in_bf16_is_no_fault():
    """Norms compute in float32, and the GPU compiler casts a vector before it gathers it."""

    def normed(p, x):
        h = x.astype(jnp.bfloat16) @ p["wide"]
        h = h.astype(jnp.float32) * jax.lax.rsqrt(jnp.mean(h.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6)
        return jnp.mean((h * p["scale"].astype(jnp.float32)).astype(jnp.bfloat16) @ p["back"]).astype(jnp.float32)

    fn = jzero.make_train_step(normed, TX, precision="bf16")
    step = jzero.shard(fn, stage=3, mesh=h100())
    zeros = {"wide": (WIDTH, 2048), "scale": (2048,), "back": (2048, WIDTH)}
    state = jax.eval_shape(fn.init, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in zeros.items()})
    report = step.report(state, jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32))
    assert any("f32[2048]" in one["arrays"] for one in report.collectives)  # else the test shows nothing
    assert not any("not achieved" in line for line in report.findings)


def test_without_strict_the_same_is_a_warning_and_a_finding():
    whole = NamedSharding(jzero.make_mesh(), NOWHERE)
    careless = lambda p, x: loss({**p, "out": lax.with_sharding_constraint(p["out"], whole)}, x)
    step, state, x = described(lambda state, x: own_step(state, x, careless), stage=3, strict=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = step.report(state, x)
    assert report.findings[0].startswith("not achieved: parameters are gathered outside their use")
    lost = [line for line in report.findings if line.startswith("not achieved: ")]
    assert [str(one.message) for one in said] == [f"jzero.shard: stage 3 {line}" for line in lost]
