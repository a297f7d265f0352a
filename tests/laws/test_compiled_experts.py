"""Experts on the programs that the H100 and TPU compilers make: two all-to-alls each way per layer, and no expert travels."""

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from jzero import models
from jzero.models import mixtral

pytestmark = [pytest.mark.compile, pytest.mark.slow]  # `test_moe.py` asks the CPU compiler the same in `make test`

LENGTH, NUM_LAYERS = 128, 2
SIZES = {"num_layers": NUM_LAYERS, "dim": 256, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 512, "vocab_size": 512}
CASES = [
    # target, capacity factor, stage, accumulate, remat
    ("h100:1x8", 1.25, 3, 1, None),
    ("h100:1x8", None, 3, 1, None),
    ("h100:1x8", None, 2, 4, "full"),
    ("h100:1x8", 1.25, 1, 4, None),
    ("v5e:2x4", 1.25, 3, 1, None),
    ("v5e:2x4", None, 3, 1, "full"),
    ("v5e:2x4", None, 1, 4, None),
]


@pytest.mark.parametrize(("target", "capacity_factor", "stage", "accumulate", "remat"), CASES, ids=str)
def test_traffic_of_experts(target, capacity_factor, stage, accumulate, remat):
    model = models.build("mixtral-tiny", capacity_factor=capacity_factor, **SIZES)
    own = jzero.make_train_step(model.loss, optax.adamw(1e-3), precision="bf16", accumulate=accumulate)
    mesh = jzero.make_mesh(expert=4, data=2, devices=jzero.topology(target))
    step = jzero.shard(own, stage=stage, mesh=mesh, rules=mixtral.expert_rules, remat=remat)
    state = jax.eval_shape(lambda key: own.init(model.init(key)), jax.random.key(0))
    report = step.report(state, jax.ShapeDtypeStruct((mesh.size * accumulate, LENGTH + 1), jnp.int32))
    assert report.engine == "composed", report.findings
    assert not any("nobody asked for" in line for line in report.findings), report.findings

    over_expert = [row for row in report.collectives if row["axis"] == "expert"]
    assert {row["kind"] for row in over_expert} == {"all-to-all"}, "experts themselves stay where they are"
    rows = [row for row in over_expert if row["dtype"] != "s32"]
    times = 4 if remat is None else 6  # there and back, forward and backward; under remat the forward pass runs twice
    assert sum(row["times"] for row in rows) == times * NUM_LAYERS * accumulate, rows
    for axis, kinds in report.wire_bytes.items():
        total = {side: sum(row[side] for row in kinds.values()) for side in ("measured", "formula")}
        assert total["measured"] <= 1.05 * total["formula"], (axis, kinds)
