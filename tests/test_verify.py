"""`jzero.verify`: passes for steps that mean the same sharded and whole, and names the first leaf of one that does not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jzero
from jzero import comm as comms
from jzero.engine import compiler
from jzero.engine import opaque as opaque_engine

TX = optax.sgd(0.1, momentum=0.9)
X = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
OPTIONS = {"min_shard_elements": 16}


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    needed = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**needed(mesh), "xla_backend_optimization_level": "0"})


def params():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(24, 48)) / 5, jnp.float32), "b": jnp.asarray(rng.normal(size=48), jnp.float32)}


def mean_loss(p, x):
    return jnp.mean(jnp.tanh(x @ p["w"] + p["b"]) ** 2)


def contrastive(p, x):
    z = x @ p["w"]
    return optax.softmax_cross_entropy_with_integer_labels(z @ z.T, jnp.arange(len(z))).mean()


def composed(loss, *, stage=3, mesh=None, precision="fp32", **options):
    own = jzero.make_train_step(loss, TX, precision=precision, **options)
    step = jzero.shard(own, stage=stage, mesh=mesh, **OPTIONS)
    return step, step.place(own.init(params()))


def opaque(fn, state, stage=3):
    step = jzero.shard(fn, stage=stage, **OPTIONS)
    return step, step.place(state)


def own_step(state, x, loss=mean_loss):
    p, opt_state = state
    value, grads = jax.value_and_grad(loss)(p, x)
    updates, opt_state = TX.update(grads, opt_state, p)
    return (optax.apply_updates(p, updates), opt_state), value


def test_a_right_step_passes_and_its_state_stays_valid():
    step, state = composed(mean_loss, accumulate=2, clip_norm=1.0)
    before = jax.device_get(state.params)
    jzero.verify(step, state, X)
    np.testing.assert_array_equal(before["w"], state.params["w"])
    step(state, X)


@pytest.mark.parametrize("reduction", ["auto", "global"])
def test_a_loss_in_which_examples_meet_passes(reduction):
    jzero.verify(*composed(contrastive, reduction=reduction), X)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_and_a_hybrid_mesh(stage):
    jzero.verify(*composed(mean_loss, stage=stage, mesh=jzero.make_mesh(replica=2)), X)


def test_sixteen_bits():
    jzero.verify(*composed(mean_loss, precision="bf16"), X, rtol=2e-2)
    jzero.verify(*composed(mean_loss, precision="bf16-pure"), X)  # leaves at rest are 16 bits: their own limit


def test_a_step_of_the_users():
    p = params()
    jzero.verify(*opaque(own_step, (p, TX.init(p))), X)


def test_local_means_of_a_loss_that_mixes_are_found_out():
    step, state = composed(contrastive, reduction="local")
    with pytest.raises(ValueError, match="2 leaves differ after one step") as error:
        jzero.verify(step, state, X)
    first, found, *rest = str(error.value).splitlines()
    assert first.startswith("jzero.verify: ")
    assert found.split()[:2] == ["params/w", "float32[24,48]"]  # of b the gradient is zero either way
    assert "allowed 1e-05" in found
    assert "mesh {'data': 8}; stage 3" in rest
    assert "reduction='global'" in rest[-1]


@pytest.mark.parametrize("engine", ["composed", "opaque"])
def test_a_gather_that_is_wrong_is_found_out(monkeypatch, engine):
    """A planted bug: every gathered parameter is a little too large."""
    comm = comms.Manual if engine == "composed" else comms.Auto
    gather = comm.gather
    monkeypatch.setattr(comm, "gather", lambda self, shard, split: 1.001 * gather(self, shard, split))
    p = params()
    step, state = composed(mean_loss) if engine == "composed" else opaque(own_step, (p, TX.init(p)))
    with pytest.raises(ValueError, match=r"leaves differ after one step\n.*/b +float32\[48\] +relative difference"):
        jzero.verify(step, state, X)


def planted(monkeypatch, index, change):
    """A bug in the opaque engine: one leaf of every step comes out changed."""
    real = opaque_engine.constrained

    def wrong(*args, **kwargs):
        return [change(leaf) if i == index else leaf for i, leaf in enumerate(real(*args, **kwargs))]

    monkeypatch.setattr(opaque_engine, "constrained", wrong)


def test_a_constraint_of_the_users_on_the_mesh():
    """The unsharded step must be able to follow it."""
    by_row = NamedSharding(jzero.make_mesh(), PartitionSpec("data"))

    def loss(p, x):
        return mean_loss(p, lax.with_sharding_constraint(x, by_row))

    jzero.verify(*composed(loss), X)
    p = params()
    jzero.verify(*opaque(lambda state, x: own_step(state, x, loss), (p, TX.init(p))), X)


class Model(eqx.Module):
    w: jax.Array
    activation: object

    def __call__(self, x):
        return self.activation(x @ self.w)


def test_static_leaves():
    model = Model(params()["w"], jnp.tanh)
    own = jzero.make_train_step(lambda model, x: jnp.mean(model(x) ** 2), TX)
    step = jzero.shard(own, stage=3, **OPTIONS)
    jzero.verify(step, step.place(own.init(model)), X)

    def train_step(state, x):
        model, opt_state = state
        value, grads = eqx.filter_value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        updates, opt_state = TX.update(grads, opt_state)
        return (eqx.apply_updates(model, updates), opt_state), value

    jzero.verify(*opaque(train_step, (model, TX.init(eqx.filter(model, eqx.is_array)))), X)


def test_static_leaves_of_which_some_train():
    model = Model(params()["w"], jnp.tanh)
    own = jzero.make_train_step(
        lambda m, x: jnp.mean((m["a"](x) - m["b"](x)) ** 2), TX,
        trainable={"a": Model(w=True, activation=False), "b": Model(w=False, activation=False)},
    )  # fmt: skip
    step = jzero.shard(own, stage=2, **OPTIONS)
    state = step.place(own.init({"a": model, "b": eqx.tree_at(lambda m: m.w, model, 1 + model.w)}))
    jzero.verify(step, state, X)
    after, _ = step(state, X)
    assert after.params["b"].activation is jnp.tanh


def test_random_keys():
    """A key in the state is split by the step, alike on one device and on many."""

    def train_step(state, x):
        key, noise = jax.random.split(state["key"])
        (p, opt_state), value = own_step((state["params"], state["opt_state"]), x + jax.random.normal(noise, x.shape))
        return {"params": p, "opt_state": opt_state, "key": key, "old": jax.random.key_data(key)}, value

    p = params()
    key = jax.random.key(3)
    state = {"params": p, "opt_state": TX.init(p), "key": key, "old": jax.random.key_data(key)}
    jzero.verify(*opaque(train_step, state), X)


def test_keys_that_differ_are_found_out(monkeypatch):
    planted(monkeypatch, 4, lambda key: jax.random.fold_in(key, 1))
    p = params()
    step, state = opaque(lambda state, x: ((*own_step(state[:2], x)[0], state[2]), x.sum()), (p, TX.init(p), jax.random.key(0)))
    with pytest.raises(ValueError, match=r"1 leaves differ after one step\n  2   key<fry>\[\]"):
        jzero.verify(step, state, X)


def test_losses_that_draw_differ_by_design_and_the_message_says_so():
    def dropout(p, x, rng):
        return mean_loss(p, x * jax.random.bernoulli(rng, 0.5, x.shape))

    with pytest.raises(ValueError, match="a stochastic loss differs by design"):
        jzero.verify(*composed(dropout), X)


def test_the_same_nan_on_both_sides_is_no_difference():
    step, state = composed(lambda p, x: mean_loss(p, x) + jnp.sqrt(-jnp.sum(p["b"] ** 2)), skip_nonfinite=False)
    jzero.verify(step, state, X)
    after, _ = step(state, X)
    assert jnp.isnan(after.params["b"]).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_nan_on_one_side_is_a_difference(monkeypatch, value):
    planted(monkeypatch, 0, lambda b: b.at[3].set(value))
    p = params()
    step, state = opaque(own_step, (p, TX.init(p)))
    with pytest.raises(ValueError, match=r"1 leaves differ after one step\n  0/b +float32\[48\] +relative difference inf"):
        jzero.verify(step, state, X)


def test_the_same_infinity_on_both_sides_is_no_difference():
    overflows = lambda state, x: (jax.tree.map(lambda leaf: leaf / 0, state), x.sum())
    jzero.verify(*opaque(overflows, {"params": params()}), X)


def test_rtol_is_the_limit_of_every_leaf(monkeypatch):
    planted(monkeypatch, 1, lambda w: w * (1 + 1e-3))
    p = params()
    step, state = opaque(own_step, (p, TX.init(p)))
    with pytest.raises(ValueError, match=r"0/w +float32\[24,48\] +relative difference 1.00e-03   allowed 1e-05"):
        jzero.verify(step, state, X)
    jzero.verify(step, state, X, rtol=2e-3)


def test_counters_must_be_equal(monkeypatch):
    planted(monkeypatch, 2, lambda count: count + 1)
    step, state = opaque(lambda state, x: (state, x.sum()), {"params": params(), "seen": jnp.int32(10_000_000)})
    with pytest.raises(ValueError, match=r"1 leaves differ after one step\n  seen   int32\[\] .* allowed 0e\+00"):
        jzero.verify(step, state, X)
