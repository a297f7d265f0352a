"""Footprint and traffic laws on the programs that the real H100 and TPU compilers make, for devices that are not there."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers
from laws.compiled_gpt import LENGTH, Spelling, make_loss, make_params, opaque_step

import jzero
from benchmarks.footprint.handwritten import CONFIG, loss_fn, make_params_abstract
from jzero import audit
from jzero.audit import meaning

pytestmark = pytest.mark.compile

# DESIGN 4: the hand-written program's temporaries in MB, by stage, on 16 H100s with accumulate 4.
TEMP_MB = {1: 1869, 2: 1018, 3: 703}
SPELLINGS = [Spelling(*flags) for flags in itertools.product((True, False), repeat=3)]
TRAFFIC = {
    # target, engine, stage, accumulate -> the spellings that `make test` compiles; the others are slow
    ("h100:2x8", "composed", 3, 1): [Spelling(False, False, True)],
    ("h100:2x8", "composed", 1, 4): [],
    ("h100:2x8", "composed", 0, 4): [],
    ("h100:2x8", "composed", 2, 4): [],
    ("h100:2x8", "opaque", 3, 1): [Spelling(False, True, False)],
    ("v5e:4x4", "composed", 3, 1): [Spelling(True, False, False)],
    ("v5e:4x4", "composed", 1, 4): [],
    ("v5e:4x4", "opaque", 3, 1): [Spelling(False, False, True)],
}


@functools.cache
def mesh_of(target: str) -> jax.sharding.Mesh:
    return jzero.make_mesh(data=16, devices=jzero.topology(target))


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_footprint_of_the_166m_gpt(stage: int) -> None:
    train_step = jzero.make_train_step(loss_fn, optax.adamw(3e-4), precision="bf16", accumulate=4)
    step = jzero.shard(train_step, stage=stage, mesh=mesh_of("h100:2x8"))
    make = lambda: train_step.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), make_params_abstract()))
    tokens = jax.ShapeDtypeStruct((16 * 4 * CONFIG.batch_per_device, CONFIG.length + 1), jnp.int32)
    report = step.report(jax.eval_shape(make), tokens)
    assert report.temp_bytes <= 1.05 * TEMP_MB[stage] * 1e6
    num_params = sum(leaf.size for leaf in jax.tree.leaves(make_params_abstract()))
    assert report.bytes_at_rest["params"]["measured"] == pytest.approx(4 * num_params / 16, rel=1e-6)
    assert report.bytes_at_rest["opt_state"]["measured"] == pytest.approx(8 * num_params / 16, rel=1e-6)
    for row in report.wire_bytes["data"].values():
        assert row["measured"] <= 1.05 * row["formula"]


def cases() -> list:
    return [
        pytest.param(*case, how, marks=() if how in quick else pytest.mark.slow)
        for case, quick in TRAFFIC.items()
        for how in SPELLINGS
    ]


@pytest.mark.parametrize(("target", "engine", "stage", "accumulate", "how"), cases())
def test_traffic(target: str, engine: str, stage: int, accumulate: int, how: Spelling) -> None:
    optimizer = optax.adamw(1e-3)
    if engine == "composed":
        fn = jzero.make_train_step(make_loss(how), optimizer, precision="bf16", accumulate=accumulate, clip_norm=1.0)
        state = jax.eval_shape(lambda: fn.init(make_params(how)))
    else:
        fn = opaque_step(how, optimizer)
        state = jax.eval_shape(lambda: (lambda params: (params, optimizer.init(params)))(make_params(how)))
    mesh = mesh_of(target)
    step = jzero.shard(fn, stage=stage, mesh=mesh)
    report = step.report(state, jax.ShapeDtypeStruct((16 * accumulate, LENGTH + 1), jnp.int32))
    shuffles = [line for line in report.findings if "nobody asked for" in line]
    assert not shuffles, shuffles
    total = {name: sum(row[name] for row in report.wire_bytes["data"].values()) for name in ("measured", "formula")}
    assert total["measured"] <= 1.05 * total["formula"], report.wire_bytes
    if stage <= 1:
        measured = audit.audit(
            step.lower(state, jax.ShapeDtypeStruct((16 * accumulate, LENGTH + 1), jnp.int32)).compile(), mesh
        )
        inside = [one for one in measured.collectives if one.loop_depth and meaning(one) in ("all-reduce", "reduce-scatter")]
        assert not inside, [audit.describe(one, mesh) for one in inside]
