"""The audit of our own models on the three compilers: traffic against the formula, bytes against the compiler's own count."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from jzero import models

LENGTH = 64
TARGETS = {"cpu": 8, "h100:2x8": 16, "v5e:4x4": 16}
QUICK = {
    # target, model, scanned, stage, accumulate
    ("cpu", "gpt2-tiny", True, 1, 4),
    ("cpu", "llama-tiny", True, 3, 4),
    ("v5e:4x4", "gpt2-tiny", True, 2, 4),
}


def cases():
    for case in itertools.product(TARGETS, ("gpt2-tiny", "llama-tiny"), (True, False), range(4), (1, 4)):
        marks = [pytest.mark.compile] if case[0] != "cpu" else []
        yield pytest.param(*case, marks=marks + ([] if case in QUICK else [pytest.mark.slow]))


@functools.cache
def mesh_of(target):
    return jzero.make_mesh(devices=None if target == "cpu" else jzero.topology(target))


@pytest.mark.parametrize(("target", "name", "scanned", "stage", "accumulate"), list(cases()))
def test_a_model_of_ours(target, name, scanned, stage, accumulate):
    model = models.build(name, scan_layers=scanned)
    precision = "fp32" if target == "cpu" else "bf16"  # the CPU compiler widens bf16 on the wire
    own = jzero.make_train_step(model.loss, optax.adamw(1e-3), precision=precision, accumulate=accumulate)
    step = jzero.shard(own, stage=stage, mesh=mesh_of(target))
    state = jax.eval_shape(lambda key: own.init(model.init(key)), jax.random.key(0))
    report = step.report(state, jax.ShapeDtypeStruct((TARGETS[target] * accumulate, LENGTH + 1), jnp.int32))

    total = {side: sum(row[side] for row in report.wire_bytes["data"].values()) for side in ("measured", "formula")}
    assert 0.95 * total["formula"] <= total["measured"] <= 1.05 * total["formula"], report.wire_bytes
    for role, row in report.bytes_at_rest.items():
        assert row["measured"] == row["formula"], role
    resting = sum(row["measured"] for row in report.bytes_at_rest.values())
    held = report.programs["argument_bytes"]
    assert resting <= held  # GPU and TPU compilers round every array up, TPUs to whole tiles
    if target == "cpu":
        assert held == resting
    moved = sum(one["wire_bytes"] for one in report.collectives)
    assert moved == total["measured"]
    if stage <= 1:
        assert not [one for one in report.collectives if one["loop_depth"] and one["kind"] in ("all-reduce", "reduce-scatter")]
