"""Checkpoints of one model read as another: renamed leaves, new ones, scanned layers unrolled and back; plain JAX."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jzero
from jzero.models.build import stack, unstack

NUM_LAYERS = 3


@functools.cache
def layered(scan_layers):
    """A step at stage 3 of a network whose layers are stacked, or in a list."""

    def make_params():
        weights = jax.random.normal(jax.random.key(0), (NUM_LAYERS, 24, 48)) / 7
        layers = {"w": weights, "b": jnp.zeros((NUM_LAYERS, 48)), "gain": jnp.ones(NUM_LAYERS)}
        return {"layers": layers if scan_layers else unstack(layers), "scale": jnp.ones(24)}

    def layer(x, params):
        return x + params["gain"] * jnp.tanh(x @ params["w"] + params["b"]) @ params["w"].T

    def loss(params, x):
        if scan_layers:
            x, _ = jax.lax.scan(lambda x, one: (layer(x, one), None), x * params["scale"], params["layers"])
        else:
            x = functools.reduce(layer, params["layers"], x * params["scale"])
        return jnp.mean(x**2)

    train_step = jzero.make_train_step(loss, optax.adamw(1e-2))
    step = jzero.shard(train_step, stage=3, min_shard_elements=64)
    return step, scrambled(step, train_step.init(make_params()))


def scrambled(step, state):
    """A state in the middle of training, without training: no two leaves, moments included, are alike."""
    random = np.random.default_rng(0)
    draw = lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype)
    params, opt_state = (jax.tree.map(draw, tree) for tree in (state.params, state.opt_state[0]))
    return step.place(state._replace(params=params, opt_state=(opt_state, *state.opt_state[1:])))


def batch():
    return np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)


def same(one, other):
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(plain(a)).tobytes() == np.asarray(plain(b)).tobytes() for a, b in pairs)


def relayered(tree, change):
    """The documented transform, on the whole state: every subtree called `layers`, of the parameters and of both moments."""
    adam = tree.opt_state[0]
    swap = lambda params: {**params, "layers": change(params["layers"])}
    opt_state = (adam._replace(mu=swap(adam.mu), nu=swap(adam.nu)), *tree.opt_state[1:])
    return tree._replace(params=swap(tree.params), opt_state=opt_state)


@pytest.mark.parametrize("scanned_on_disk", [True, False])
def test_scanned_and_unrolled_layers(tmp_path, scanned_on_disk):
    _, state = layered(scanned_on_disk)
    jzero.save(tmp_path / "one", state)
    step, _ = layered(not scanned_on_disk)
    with pytest.raises(ValueError, match=r"Layers are stacked in one of the two.*pass restack=True"):
        jzero.restore(tmp_path / "one", step)
    restored = jzero.restore(tmp_path / "one", step, restack=True)
    expected = relayered(state, unstack if scanned_on_disk else stack)
    assert same(restored, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == step.known[0].tree
    if scanned_on_disk:
        step(restored, batch())  # which takes it as its own


# A model with other names and a new head ----------------------------------------------------------------------------------


def make(names, classes):
    """The same network under other names: names = (body, head)."""
    body, head = names

    def make_params(key):
        one, two = jax.random.split(key)
        return {body: {"w": jax.random.normal(one, (24, 24))}, head: {"w": jax.random.normal(two, (24, classes))}}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params[body]["w"]) @ params[head]["w"]) ** 2)

    train_step = jzero.make_train_step(loss, optax.adamw(1e-2))
    step = jzero.shard(train_step, stage=3, min_shard_elements=64)
    return step, lambda seed: step.place(train_step.init(make_params(jax.random.key(seed))))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    step, make_state = make(("encoder", "head"), 48)
    state = scrambled(step, make_state(0))
    manager = jzero.CheckpointManager(tmp_path_factory.mktemp("pretrained") / "run")
    manager.save(7, state)
    manager.close()
    return manager.path, state


def test_renamed_leaves_of_parameters_and_moments(pretrained):
    path, state = pretrained
    step, make_state = make(("backbone", "head"), 48)
    make_state(1)
    with pytest.raises(ValueError, match=r"3 missing, 3 extra") as caught:
        jzero.restore(path, step)
    assert r"pass rename={r'\bencoder/': 'backbone/'}" in str(caught.value), "the transform to write"
    restored = jzero.restore(path, step, rename={r"\bencoder/": "backbone/"})
    assert same(restored.params["backbone"], state.params["encoder"])
    assert same(restored.opt_state[0].nu["backbone"], state.opt_state[0].nu["encoder"])
    with pytest.raises(ValueError, match=r"rename= 'decoder' changes no name"):
        jzero.restore(path, step, rename={"decoder": "x"})
    with pytest.raises(ValueError, match="gives two leaves one name"):
        jzero.restore(path, step, rename={r"\b(encoder|head)/": "backbone/"})


def test_new_leaves_for_fine_tuning_are_listed(pretrained):
    path, state = pretrained
    step, make_state = make(("backbone", "head"), 72)
    fresh = make_state(1)
    head = np.array(fresh.params["head"]["w"])
    with pytest.raises(ValueError, match=r"(?s)params/head/w +float32\[24,48\] +the step expects float32\[24,72\].*old_head"):
        jzero.CheckpointManager(path).restore(step, weights_only=True, rename={"encoder/": "backbone/"})
    rename = {r"\bencoder/": "backbone/", r"\bhead/": "old_head/"}
    with pytest.raises(ValueError, match=r"(?s)1 leaves are not on disk.*params/head/w.*into="):
        jzero.restore(path, step, weights_only=True, rename=rename, partial=True)
    with pytest.warns(UserWarning, match=r"(?s)1 leaves keep their first values.*params/head/w +not on disk"):
        restored, _ = jzero.CheckpointManager(path).restore(step, weights_only=True, rename=rename, partial=True, into=fresh)
    assert same(restored.params["backbone"], state.params["encoder"])
    assert np.array_equal(restored.params["head"]["w"], head)
    assert int(restored.step) == 0
    step(restored, np.ones((8, 24), np.float32))


def test_partial_keeps_the_optimizer_where_it_fits(pretrained):
    path, state = pretrained
    step, make_state = make(("encoder", "value"), 8)
    with pytest.warns(UserWarning, match=r"(?s)3 leaves keep.*3 on disk are not used.*opt_state/0/mu/head/w +left on disk"):
        restored = jzero.restore(path, step, partial=True, into=make_state(1))
    assert same(restored.opt_state[0].mu["encoder"], state.opt_state[0].mu["encoder"])
    assert not np.any(restored.opt_state[0].mu["value"]["w"])


def test_without_a_known_state_changes_cannot_be_made(pretrained):
    step, _ = make(("backbone", "head"), 48)
    with pytest.raises(ValueError, match=r"(?s)structure of the state is not known.*to be changed"):
        jzero.restore(pretrained[0], step, rename={"encoder": "backbone"})


# What lies beside the arrays, and plain Orbax ------------------------------------------------------------------------------


def test_stage_and_precision_are_noted_without_being_told(tmp_path):
    """The manager is given no step: the one that made the state is found. Two steps that could have made it leave it open."""

    def noted(name, state):
        jzero.save(tmp_path / name, state)
        notes = json.loads((tmp_path / name / "jzero" / "metadata").read_text())
        return notes["stage"], (notes["precision"] or {}).get("compute")

    train_step = jzero.make_train_step(lambda params, x: jnp.mean((x @ params["only here"]) ** 2), optax.sgd(0.1))
    step = jzero.shard(train_step, stage=2, min_shard_elements=64)
    state = step.init(train_step.init, lambda: {"only here": jnp.ones((24, 40))})
    assert noted("one", state) == (2, "float32")
    other = jzero.shard(train_step, stage=3, min_shard_elements=64)
    state = other.init(train_step.init, lambda: {"only here": jnp.ones((24, 40))})
    assert noted("open", state) == (None, None)


def test_a_plain_loop_is_adopted_and_given_back(tmp_path):
    """Acceptance 6: a plain JAX loop writes with plain Orbax, jzero goes on in one call; and the other way round."""
    tx = optax.adam(1e-2)
    loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)
    x = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)

    @jax.jit
    def plain_step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    keys = jax.random.split(jax.random.key(0))
    params = {"up": jax.random.normal(keys[0], (24, 48)), "down": jax.random.normal(keys[1], (48, 24))}
    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state, _ = plain_step(params, opt_state)
    with ocp.CheckpointManager(tmp_path / "plain") as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": params, "opt_state": opt_state}))

    def train_step(state, x):
        value, grads = jax.value_and_grad(loss)(state["params"], x)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, value

    step = jzero.shard(train_step, stage=3, min_shard_elements=64)
    step.shardings(jax.eval_shape(lambda: {"params": params, "opt_state": opt_state}))
    adopted = jzero.restore(tmp_path / "plain", step)  # the one call
    assert same(adopted, {"params": params, "opt_state": opt_state})
    state, value = step(adopted, x)
    _, _, expected = plain_step(params, opt_state)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)

    ours = jzero.CheckpointManager(tmp_path / "ours")
    ours.save(4, state)
    ours.close()
    shapes = {"params": params, "opt_state": opt_state}
    names = {"params": params, "opt_state": {"0": opt_state[0]._asdict()}}  # dicts of names is what is on disk
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), names)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "ours" / "4" / "state", item)
    assert same(back["params"], state["params"])
    back = {"params": back["params"], "opt_state": (type(opt_state[0])(**back["opt_state"]["0"]), *opt_state[1:])}
    assert jax.tree.structure(back) == jax.tree.structure(shapes)
    *_, value = plain_step(back["params"], back["opt_state"])
    assert float(value) == pytest.approx(float(step(state, x)[1]), rel=1e-5)
