"""Roles and owners over every optimizer and state layout, from abstract states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import layouts
import optax
import pytest
from flax import nnx
from flax.core import meta
from tables import NUM_MIRRORS, OPTIMIZERS, adamw

from jzero.roles import assign


def abstract_state(layout, tx):
    """The state without arrays, and the expected paths."""
    paths = []

    def build():
        state, expected = layouts.LAYOUTS[layout](tx)
        paths.append(expected)
        return state

    return jax.eval_shape(build), paths[0]


def of_role(leaves, role):
    return {leaf.path for leaf in leaves if leaf.role == role}


def relative(path, params):
    """Path below the model: the last two names in these layouts."""
    return "/".join(path.split("/")[-2:])


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_in_every_layout(optimizer, layout):
    state, expected = abstract_state(layout, OPTIMIZERS[optimizer]())
    leaves = assign(state)
    assert of_role(leaves, "params") == expected
    assert len(leaves) == len(jax.tree.leaves(state))
    for i, leaf in enumerate(leaves):
        if leaf.role == "params":
            assert leaf.owner == i
        elif leaf.owner is not None:
            owner = leaves[leaf.owner]
            assert leaf.role == "opt_state"
            assert owner.role == "params"
            assert owner.shape == leaf.shape
            assert relative(owner.path, expected) == relative(leaf.path, expected)
    per_matrix, per_vector = NUM_MIRRORS[optimizer]
    num_mirrors = sum(leaf.owner is not None and leaf.role == "opt_state" for leaf in leaves)
    assert num_mirrors == per_matrix * layouts.NUM_MATRICES + per_vector * layouts.NUM_VECTORS
    num_opt_leaves = len(jax.tree.leaves(jax.eval_shape(OPTIMIZERS[optimizer]().init, layouts.params())))
    assert len(of_role(leaves, "opt_state")) == num_opt_leaves + (layout == "nnx_optimizer")


# States that no optimizer library wrote ---------------------------------------------------------------------------------------


def roles(state, **options):
    """role -> paths, and path -> owner's path."""
    leaves = assign(jax.eval_shape(lambda: state), **options)
    found = {role: of_role(leaves, role) for role in ("params", "opt_state", "other")}
    owners = {leaf.path: leaves[leaf.owner].path for i, leaf in enumerate(leaves) if leaf.owner not in (None, i)}
    return found, owners


W = layouts.params()
SMALL = {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)}
ATTENTION = {name: {"kernel": jnp.zeros((6, 6))} for name in ("q", "k", "v", "m")}


@pytest.mark.parametrize(
    ("state", "params"),
    [
        ({"w": W, "m": W, "v": W, "t": 0}, "w/"),
        ({"params": W, "mu": W, "nu": W}, "params/"),
        ({"params": W, "first": W, "second": W}, "params/"),
        ({"net": W, "momentum": W}, "net/"),
        ((W, {"m": W, "v": W, "count": 0}), "0/"),
        ({"params": W, "adam": {"exp_avg": W, "exp_avg_sq": W}, "step": 0}, "params/"),
        ({"model": W, "opt": {"m": W, "v": W}}, "model/"),
    ],
)
def test_hand_written_moments_are_known_by_name(state, params):
    found, owners = roles(state)
    assert found["params"] == layouts.names(params)
    num_copies = sum(jnp.shape(leaf) == (96, 24) for leaf in jax.tree.leaves(state)) - 1
    assert len(found["opt_state"]) == num_copies * len(layouts.names())
    assert {owners[path] for path in found["opt_state"]} == found["params"]


def test_single_array_parameters():
    w = jnp.zeros((6, 3))
    found, owners = roles({"w": w, "m": w, "v": w})
    assert (found["params"], owners) == ({"w"}, {"m": "w", "v": "w"})
    found, owners = roles((w, optax.adamw(1e-3).init(w), jnp.zeros((5, 5))))
    assert (found["params"], owners) == ({"0"}, {"1/0/mu": "0", "1/0/nu": "0"})
    assert roles(w)[0]["params"] == {""}


def test_parts_of_a_model_that_are_named_like_moments_stay_parameters():
    block = {**ATTENTION, "norm": jnp.zeros(6)}
    for state in (block, {"params": ATTENTION}, (ATTENTION, optax.sgd(0.1).init(ATTENTION)), {"0": block, "1": block}):
        found, owners = roles(state)
        assert len(found["params"]) == len(jax.tree.leaves(state))
        assert not owners
    one_value = {"o": {"kernel": jnp.zeros((6, 6))}, "v": {"kernel": jnp.zeros((6, 6))}, "norm": jnp.zeros(6)}
    assert roles(one_value)[0]["params"] == {"o/kernel", "v/kernel", "norm"}
    state = {"params": ATTENTION, "m": ATTENTION}
    found, owners = roles(state)
    assert found["params"] == {f"params/{name}/kernel" for name in ATTENTION}
    assert owners == {f"m/{name}/kernel": f"params/{name}/kernel" for name in ATTENTION}


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        {"params": SMALL}["params"] | {"norm": {"mean": jnp.zeros(3)}},
        [(jnp.zeros((6, 6)), jnp.zeros(6)), (jnp.zeros((6, 6)), jnp.zeros(6))],
        {"layer_0": SMALL, "layer_1": SMALL},
        {"encoder": SMALL, "decoder": {"w": jnp.zeros((3, 6))}},
    ],
)
def test_a_state_that_is_only_parameters(model):
    assert len(roles(model)[0]["params"]) == len(jax.tree.leaves(model))
    with_step = roles({"model": model, "step": 0, "key": jax.random.PRNGKey(0)})[0]
    assert len(with_step["params"]) == len(jax.tree.leaves(model))
    assert with_step["other"] == {"step", "key"}


# Copies, several models, frozen parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "params", "copy"),
    [
        ({"params": W, "ema": W, "opt": adamw().init(W)}, "params/", "ema/"),
        ({"net": W, "ema_net": W, "tx": adamw().init(W)}, "net/", "ema_net/"),
        ({"params": W, "ema": W, "tx": OPTIMIZERS["ema"]().init(W)}, "params/", "ema/"),
        ({"model": W, "target": W, "tx": OPTIMIZERS["sgd"]().init(W)}, "model/", "target/"),
        ({"net": W, "ema": W, "tx": OPTIMIZERS["sgd"]().init(W)}, "net/", "ema/"),
        ({"w": W, "m": W, "ema": W}, "w/", "ema/"),
    ],
)
def test_the_users_own_average_follows_the_parameters(state, params, copy):
    found, owners = roles(state)
    assert found["params"] == layouts.names(params)
    assert layouts.names(copy) <= found["other"]
    assert all(owners[copy + path] == params + path for path in layouts.names())


def test_an_average_of_flat_parameters():
    found, owners = roles({**SMALL, "ema": SMALL, "tx": adamw().init(SMALL)})
    assert found["params"] == {"w", "b"}
    assert owners["ema/w"] == "w"
    assert owners["tx/0/mu/b"] == "b"


def test_two_models_with_an_optimizer_each():
    def trained(model):
        return {"params": model, "opt_state": adamw().init(model)}

    found, owners = roles({"generator": trained(SMALL), "critic": trained(SMALL)})
    assert found["params"] == {f"{model}/params/{name}" for model in ("generator", "critic") for name in SMALL}
    assert owners["critic/opt_state/0/mu/w"] == "critic/params/w"
    assert owners["generator/opt_state/0/mu/w"] == "generator/params/w"
    wide = {"w": jnp.zeros((9, 3)), "b": jnp.zeros(3)}
    state = {"g": SMALL, "c": wide, "g_opt": adamw().init(SMALL), "c_opt": adamw().init(wide)}
    assert roles(state)[0]["params"] == {"g/w", "g/b", "c/w", "c/b"}


def test_lookahead_keeps_its_slow_copy_beside_the_parameters():
    both = optax.LookaheadParams.init_synced(SMALL)
    found, owners = roles((both, optax.lookahead(adamw(), sync_period=2, slow_step_size=0.5).init(both)))
    assert found["params"] == {"0/fast/w", "0/fast/b"}
    assert owners["0/slow/w"] == "0/fast/w"


def test_frozen_parameters_are_parameters():
    state = (W, optax.multi_transform({"on": adamw(), "off": optax.set_to_zero()}, train_head_only).init(W))
    found, owners = roles(state)
    assert found["params"] == layouts.names("0/")
    assert set(owners.values()) == {"0/head/kernel", "0/head/bias"}


def train_head_only(params):
    return {module: dict.fromkeys(below, "on" if module == "head" else "off") for module, below in params.items()}


def test_all_leaves_factored():
    matrices = {"a": jnp.zeros((24, 48)), "b": jnp.zeros((48, 24))}
    found, owners = roles((matrices, OPTIMIZERS["adafactor"]().init(matrices), jnp.zeros((5, 5))))
    assert (found["params"], found["other"], owners) == ({"0/a", "0/b"}, {"2"}, {})


def test_scalars_counters_and_tables_in_the_model():
    model = {
        **SMALL,
        "temperature": jnp.zeros(()),
        "table": jnp.zeros(7, "int32"),
        "seen": jnp.zeros((), "int32"),
        "key": jax.random.key(0),
        "old_key": jax.random.PRNGKey(0),
    }
    found, _ = roles({"params": model, "opt_state": OPTIMIZERS["sgd"]().init(model)})
    assert found["params"] == {f"params/{name}" for name in ("w", "b", "temperature", "table")}
    assert found["other"] == {"params/seen", "params/key", "params/old_key"}


def test_collections_beside_the_parameters():
    variables = {"params": SMALL, "spectral": {"u": jnp.zeros((6, 1))}}
    found, _ = roles((variables, OPTIMIZERS["sgd"]().init(SMALL)))
    assert (found["params"], found["other"]) == ({"0/params/w", "0/params/b"}, {"0/spectral/u"})
    found, owners = roles({"params": SMALL, "opt_state": adamw().init(SMALL), "previous": SMALL})
    assert (found["other"], owners["previous/w"]) == ({"previous/w", "previous/b"}, "params/w")


def test_a_trained_leaf_may_have_any_name():
    model = {"cache": SMALL, "batch_stats": SMALL, "w": jnp.zeros((6, 3))}
    assert len(roles((model, adamw().init(model)))[0]["params"]) == 5
    assert roles((model, OPTIMIZERS["sgd"]().init(model)))[0]["params"] == {"0/w"}


# nnx and linen ----------------------------------------------------------------------------------------------------------------


def test_nnx_variables_tell_their_roles():
    found, _ = roles(nnx.split(layouts.NnxModel()))
    assert found["params"] == layouts.names("1/")
    assert found["other"] == {"1/norm", "1/dropout/rngs/count", "1/dropout/rngs/key"}


def test_nnx_modules_as_they_are():
    model = layouts.NnxModel()
    found, owners = roles((model, nnx.Optimizer(model, adamw(), wrt=nnx.Param)))
    assert found["params"] == layouts.names("0/")
    assert owners["1/opt_state/0/mu/block_1/bias"] == "0/block_1/bias"


def test_nnx_model_and_optimizer_in_one():
    both = nnx.ModelAndOptimizer(layouts.NnxModel(), adamw(), wrt=nnx.Param)
    found, owners = roles(nnx.split(both)[1])
    assert found["params"] == layouts.names("model/")
    assert len(owners) == 2 * len(found["params"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_nnx_average(optimizer):
    weights = nnx.state(layouts.NnxModel(), nnx.Param)
    found, owners = roles({"model": weights, "ema": weights, "tx": OPTIMIZERS[optimizer]().init(weights)})
    assert found["params"] == layouts.names("model/")
    assert owners["ema/head/bias"] == "model/head/bias"


def test_linen_boxes_leave_no_trace_in_paths():
    boxed = {"dense": {"kernel": meta.Partitioned(jnp.zeros((6, 3)), names=(None, None))}}
    found, owners = roles((boxed, adamw().init(boxed)))
    assert found["params"] == {"0/dense/kernel"}
    assert owners["1/0/mu/dense/kernel"] == "0/dense/kernel"


def test_a_field_called_value_keeps_its_name():
    state = layouts.Inner(weights={"value": jnp.zeros((6, 3))}, moments=optax.EmptyState())
    assert roles(state)[0]["params"] == {"weights/value"}


# Said by the user -------------------------------------------------------------------------------------------------------------


def test_params_says_which_leaves():
    found, owners = roles((W, W, W, 0), params=lambda state: state[1])
    assert found["params"] == layouts.names("1/")
    assert found["opt_state"] == layouts.names("0/") | layouts.names("2/")
    assert owners["2/block_1/kernel"] == "1/block_1/kernel"


def test_params_may_be_filtered_or_rearranged():
    model = eqx.nn.MLP(6, 3, 6, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    found, owners = roles((arrays, adamw().init(arrays)), params=lambda state: eqx.filter(state[0], eqx.is_inexact_array))
    assert found["params"] == {f"0/layers/{i}/{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert owners["1/0/nu/layers/1/bias"] == "0/layers/1/bias"
    state = {"encoder": SMALL, "decoder": SMALL, "tx": adamw().init((SMALL, SMALL))}
    found, owners = roles(state, params=lambda state: (state["encoder"], state["decoder"]))
    assert owners["tx/0/mu/1/w"] == "decoder/w"
    weights = nnx.state(layouts.NnxModel(), nnx.Param)
    state = {"model": weights, "ema": weights, "tx": adamw().init(weights)}
    assert roles(state, params=lambda state: state["ema"])[0]["params"] == layouts.names("ema/")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (lambda state: state["model"], "KeyError: 'model'"),
        (lambda state: {}, "returned no leaves"),
        (lambda state: jax.tree.map(lambda leaf: leaf * 2, state["net"]), "no leaves of the state"),
        (lambda state: state["net"]["w"].shape, "no leaves of the state"),
    ],
)
def test_params_that_is_wrong(params, words):
    with pytest.raises(ValueError, match=words) as error:
        assign({"net": SMALL}, params=params)
    assert "net/w   float32[6,3]" in str(error.value)
    assert "params=lambda state: state" in str(error.value)


# What cannot be told ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ((W, W, W), "params=lambda state: state[0])"),
        ((W, W, adamw().init(W)), "params=lambda state: state[0])"),
        ({"x": W, "y": W}, "params=lambda state: state['x'])"),
        ({"x": W, "y": W, "tx": adamw().init(W)}, "params=lambda state: state['x'])"),
        (({"x": SMALL, "y": SMALL}, adamw().init(SMALL)), "params=lambda state: state[0]['x'])"),
        ((SMALL, jnp.zeros((5, 5)), optax.sgd(0.1).init(SMALL)), "params=lambda state: state[0])"),
        (layouts.Outer(W, W), "params=lambda state: state.train)"),
    ],
)
def test_ambiguous_states_name_the_line_to_write(state, line):
    with pytest.raises(ValueError, match="cannot tell which leaves are the parameters") as error:
        assign(state)
    text = str(error.value)
    assert text.startswith("jzero.shard: ")
    assert line in text
    leaf = "float32[96,24]" if "float32[96,24]" in text else "float32[6,3]"
    assert leaf in text


def test_a_long_tree_is_cut():
    layers = {f"layer{i}{letter}": SMALL for i in range(30) for letter in "ab"}
    with pytest.raises(ValueError, match="and 201 more leaves") as error:
        assign((layers, layers))
    assert len(str(error.value).splitlines()) < 48


def test_leaves_that_are_no_arrays_are_named():
    model = eqx.nn.MLP(6, 3, 6, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match="2 of the state's leaves are no arrays") as error:
        assign((model, adamw().init(eqx.filter(model, eqx.is_inexact_array))))
    text = str(error.value)
    assert "0/activation" in text
    assert "0/final_activation" in text
    assert "eqx.partition" in text
    with pytest.raises(TypeError, match="name"):
        assign({"w": jnp.zeros((6, 3)), "name": "adam"})


def test_one_array_twice_and_nothing_at_all():
    shared = jnp.zeros((6, 3))
    state = {"params": {"a": shared, "b": shared}, "opt_state": adamw().init({"a": shared, "b": shared})}
    assert of_role(assign(state), "params") == {"params/a", "params/b"}
    assert assign({}) == ()
    assert [leaf.role for leaf in assign({"step": 0, "key": jax.random.key(0)})] == ["other", "other"]


def test_concrete_and_abstract_states_agree():
    state = (W, adamw().init(W), jax.random.key(0), 3, 0.5)
    assert assign(state) == assign(jax.eval_shape(lambda: state))
