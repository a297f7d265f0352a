"""Our models with their tensor rules: one device's loss and update, ZeRO's traffic over `data`, Megatron's over `tensor`."""

import jax
import numpy as np
import optax
import pytest
from closeness import assert_within, on_host
from closeness import sizes as sizes_of
from compiling import quick_jit

import jzero
from jzero import models
from jzero.models import gpt2, llama

RULES = {"gpt2-tiny": gpt2.tensor_rules, "llama-tiny": llama.tensor_rules}
NUM_LAYERS, ROWS, LENGTH = 2, 16, 33


@pytest.fixture(params=["llama-tiny", pytest.param("gpt2-tiny", marks=pytest.mark.slow)])
def case(request):
    """A model's step by stage 3 on data 4 x tensor 2, its state, a batch, and what one device makes of them."""
    model = models.build(request.param, num_layers=NUM_LAYERS)
    train_step = jzero.make_train_step(model.loss, optax.sgd(0.1), clip_norm=1.0)
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH), np.int32)
    expected = quick_jit(train_step)(train_step.init(model.init, jax.random.key(0)), tokens)
    mesh = jzero.make_mesh(data=4, tensor=2)
    step = jzero.shard(train_step, stage=3, mesh=mesh, rules=RULES[request.param])
    return request.param, step, step.init(train_step.init, model.init, jax.random.key(0)), tokens, expected


def test_parity_and_traffic(case):
    name, step, state, tokens, (state_expected, metrics_expected) = case
    report = step.report(state, tokens)
    data, tensor = report.wire_bytes["data"], report.wire_bytes["tensor"]
    assert all(figure["measured"] <= 1.05 * figure["formula"] for figure in data.values()), data
    shards = {leaf["path"]: leaf["spec"] for leaf in report.leaves if leaf["role"] == "params"}
    assert shards["params/wte/embedding"] == "P('tensor', 'data')"
    assert not any("splits no leaf" in line for line in report.findings)
    if name == "llama-tiny":
        assert list(tensor) == ["all-reduce"], "what Megatron moves is sums of activations"
        kernels = [path for path in shards if path.endswith("kernel")]
        assert all("'tensor'" in shards[path] for path in kernels)
        activation = ROWS // 4 * (LENGTH - 1) * 192 * 4  # bytes of x[B_data, T, D]; float32
        inside = [row for row in report.collectives if row["axis"] == "tensor" and row["loop_depth"]]
        assert all(row["times"] == NUM_LAYERS for row in inside)
        num_forward = 2  # after the attention's and the MLP's second product
        num_backward = 5  # into q, k, v, gate and up: compilers that add before they reduce make two of them
        assert sum(row["wire_bytes"] for row in inside) == (num_forward + num_backward) * activation * NUM_LAYERS
    state, metrics = step(state, tokens)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_expected["loss"]), rel=1e-5)
    expected = on_host(state_expected.params)
    allowed = {path: 1e-5 * size for path, size in sizes_of(expected).items()}
    assert_within(on_host(state.params), expected, allowed, "parameters after a step of SGD")


def test_an_axis_that_nothing_uses_is_a_finding():
    train_step = jzero.make_train_step(lambda params, x: (x @ params["w"]).sum(), optax.sgd(0.1))
    step = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(data=4, tensor=2))
    state = step.init(train_step.init, lambda: {"w": np.ones((64, 32), np.float32)})
    (line,) = [line for line in step.report(state, np.ones((8, 64), np.float32)).findings if "tensor" in line]
    assert line.startswith("axis 'tensor' (2) splits no leaf: its devices repeat each other's work")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["composed", "opaque"])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_our_models_on_a_split_sequence(kind, engine):
    """Llama with grouped heads by stage 3 on data 2 x sequence 4, in both engines: one device's loss and update."""
    sizes = {"num_layers": NUM_LAYERS, "num_heads": 4, "num_kv_heads": 2, "dim": 48, "ffn_dim": 96, "vocab_size": 64}
    model = models.build("llama-tiny", attention_kind=kind, **sizes)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17), np.int32)

    def own_step(params, tokens):
        loss, grads = jax.value_and_grad(model.loss)(params["params"], tokens)
        return {"params": jax.tree.map(lambda param, grad: param - 0.1 * grad, params["params"], grads)}, {"loss": loss}

    composed = jzero.make_train_step(model.loss, optax.sgd(0.1))
    train_step, make = (composed, composed.init) if engine == "composed" else (own_step, lambda params: {"params": params})
    params_of = lambda state: state.params if engine == "composed" else state["params"]
    state_expected, metrics_expected = quick_jit(train_step)(make(model.init(jax.random.key(0))), tokens)
    step = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(data=2, sequence=4), min_shard_elements=100)
    state, metrics = step(step.place(make(model.init(jax.random.key(0)))), tokens)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_expected["loss"]), rel=1e-5)
    expected = on_host(params_of(state_expected))
    allowed = {path: 1e-5 * size for path, size in sizes_of(expected).items()}
    assert_within(on_host(params_of(state)), expected, allowed, "parameters after a step of SGD")
