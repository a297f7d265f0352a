"""Kernels inside a sharded step: its report lists them, its loss does not change with them, its gradient stays manual."""

import contextlib

import jax
import numpy as np
import optax
import pytest

import jzero
import pallas_kernels
from jzero import models
from jzero.engine import compiler

# name -> the head, attention, and what is around
LOSSES = {
    "plain": ("plain", None, contextlib.nullcontext),
    "all off": ("auto", None, pallas_kernels.disabled),
    "auto": ("auto", None, contextlib.nullcontext),
    "all on": ("chunked", "chunked", contextlib.nullcontext),
}


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    """Without LLVM's optimizer: half the time, and no HLO changes."""
    needed = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**needed(mesh), "xla_backend_optimization_level": "0"})


def build(loss, attention=None):
    sizes = {"num_layers": 1, "dim": 96, "num_heads": 3, "vocab_size": 250, "padded_vocab_size": 264}
    model = models.build("gpt2-tiny", **sizes, loss=loss, attention=attention)
    return model, jzero.make_train_step(model.loss, optax.adamw(1e-2))


def curve(params, loss, attention, context):
    """Losses of a few steps on one text, and the step's report."""
    text = np.frombuffer(jzero.__doc__.encode() * 40, np.uint8)[: 3 * 8 * 33].reshape(3, 8, 33).astype(np.int32)
    with context():
        own = build(loss, attention)[1]
        step = jzero.shard(own, stage=3)
        state = step.place(own.init(params))
        report = step.report(state, text[0])
        losses = []
        for index in range(9):
            state, metrics = step(state, text[index % 3])
            losses.append(float(metrics["loss"]))
    return losses, report


@pytest.mark.slow
def test_the_loss_curve_is_the_same_with_kernels_and_without():
    params = jax.jit(build("plain")[0].init)(jax.random.key(0))
    curves = {name: curve(params, *how) for name, how in LOSSES.items()}
    wanted = curves["plain"][0]
    assert wanted[-1] < 0.8 * wanted[0]
    for losses, _ in curves.values():
        np.testing.assert_allclose(losses, wanted, rtol=2e-3)  # Adam amplifies the rounding of a different order of sums
        np.testing.assert_allclose(losses[0], wanted[0], rtol=1e-6)
    said = {
        name: {row["op"]: (row["implementation"], row["reason"], row["calls"]) for row in report.kernels}
        for name, (_, report) in curves.items()
    }
    unnamed = (
        "plain",
        "not cudnn: it runs on a GPU, and this is for cpu; not splash: it runs on a TPU, and this is for cpu",
        1,
    )
    head, named = "linear_cross_entropy_sum", ("chunked", "named by the caller", 1)
    assert said == {
        "plain": {"attention": unnamed},
        "all off": {"attention": ("plain", "kernels are disabled", 1), head: ("reference", "kernels are disabled", 1)},
        "auto": {"attention": unnamed, head: ("fused", "preferred here", 1)},
        "all on": {"attention": named, head: named},
    }
    assert curves.pop("plain")[1].engine == "composed"
    for _, report in curves.values():
        assert report.engine == "composed"
        assert "linear_cross_entropy_sum" in str(report)
        shapes = {row["op"]: row["arrays"][0] for row in report.to_dict()["kernels"]}
        assert shapes == {"attention": "float32[1,32,3,32]", "linear_cross_entropy_sum": "float32[1,32,96]"}  # one shard's


@pytest.mark.slow
def test_a_large_vocabulary_takes_parts_in_the_shard():
    """Under shard_map one example's logits past 256 MiB are made part by part; nothing is compiled or run here."""
    model = models.build("llama-8b", num_layers=1, loss="auto")
    own = jzero.make_train_step(model.loss, optax.sgd(1e-2), precision="bf16")
    step = jzero.shard(own, stage=3)
    state = jax.eval_shape(lambda key: own.init(model.init(key)), jax.random.key(0))
    with pallas_kernels.recording() as choices:
        step.lower(state, jax.ShapeDtypeStruct((8, 2049), np.int32))
    assert choices[-1].implementation == "chunked"


@pytest.mark.compile
@pytest.mark.slow
def test_the_gradient_of_a_head_without_logits_does_not_wait():
    """Compiled for H100s: nothing of the table's shape is alive where the layers are differentiated, where the peak lies."""
    sizes = {
        "dim": 1024,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "ffn_dim": 16384,
        "vocab_size": 65536,
        "max_seq": 2048,
    }
    model = models.build("llama-tiny", **sizes, loss="chunked", attention="chunked")
    own = jzero.make_train_step(model.loss, optax.adamw(1e-3), precision="bf16")
    step = jzero.shard(own, stage=3, remat="full", mesh=jzero.make_mesh(devices=jzero.topology("h100:1x8")))
    state = jax.eval_shape(lambda key: own.init(model.init(key)), jax.random.key(0))
    found = step.report(state, jax.ShapeDtypeStruct((8, 2049), jax.numpy.int32))
    largest = [row["array"] for row in found.peak_buffers]
    assert not any("65536" in array for array in largest), largest
    assert any("16384" in array for array in largest), "the peak is to lie in the layers"
