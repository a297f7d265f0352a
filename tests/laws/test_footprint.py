"""Footprint law: what rests on a device between steps is DESIGN 3's table, leaf by leaf, and the report says the same.

Psi parameters in float32 under adamw, N devices on `data`: `opt_state` 8 Psi bytes at stage 0 and 8 Psi / N from stage
1 on; `params` 4 Psi at stage 0 and 4 Psi / N from stage 1 on, but an opaque step keeps its own whole at stages 1 and 2.
`replica` saves nothing.
"""

import jax
import jax.numpy as jnp
import meshes
import pytest
import small_gpt
import tiny

import jzero

STAGES = (0, 1, 2, 3)
SHARDED_PARAMS = {"composed": (1, 2, 3), "opaque": (3,)}
ADAM_COUNT_BYTES = 4  # the one leaf of adamw's state that is no moment: int32[]


def parts(state):
    """role -> leaves, read off the state by hand."""
    fields = state if isinstance(state, dict) else state._asdict()
    return {role: jax.tree.leaves(fields[role]) for role in ("params", "opt_state")}


def on_device(leaf, index):
    return leaf.addressable_shards[index].data.nbytes


def expected_bytes(leaf, *, role, engine, stage, num_shards, min_shard_elements):
    """The table for one leaf, every dim of which `data` divides."""
    sharded = stage in (SHARDED_PARAMS[engine] if role == "params" else (1, 2, 3))
    return leaf.nbytes // (num_shards if sharded and leaf.size >= min_shard_elements else 1)


def check_at_rest(state, **options):
    for role, leaves in parts(state).items():
        for leaf in leaves:
            for index in range(len(leaf.sharding.device_set)):
                assert on_device(leaf, index) == expected_bytes(leaf, role=role, **options), (role, leaf.shape, index)


@pytest.mark.parametrize("mesh", meshes.MESHES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_the_table(engine, stage, mesh):
    """All leaves shard: the sums are the table's to the byte, before a step, after it, and in the report."""
    num_shards, num_params = meshes.MESHES[mesh]["data"], sum(leaf.size for leaf in jax.tree.leaves(tiny.make_params()))
    train_step, make_state = tiny.make(engine)
    step = jzero.shard(train_step, stage=stage, mesh=meshes.make(mesh), min_shard_elements=1)
    options = {"engine": engine, "stage": stage, "num_shards": num_shards, "min_shard_elements": 2}
    x = tiny.batch()
    state = step.place(make_state(tiny.make_params()))
    check_at_rest(state, **options)
    resting = step.report(state, x).to_dict()["bytes_at_rest"]
    state, _ = step(state, x)
    check_at_rest(state, **options)
    opt_state_bytes = 8 * num_params // (num_shards if stage else 1) + ADAM_COUNT_BYTES
    params_bytes = 4 * num_params // (num_shards if stage in SHARDED_PARAMS[engine] else 1)
    num_batch_shards = num_shards * meshes.MESHES[mesh].get("replica", 1)
    for role, num_bytes in {
        "params": params_bytes,
        "opt_state": opt_state_bytes,
        "batch": x.nbytes // num_batch_shards,
    }.items():
        assert resting[role] == {"measured": num_bytes, "formula": num_bytes}, role
    counted = {role: sum(on_device(leaf, 0) for leaf in leaves) for role, leaves in parts(state).items()}
    assert counted == {"params": params_bytes, "opt_state": opt_state_bytes}


@pytest.mark.parametrize("mesh", meshes.MESHES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_leaf_by_leaf(engine, stage, mesh):
    """A scanned model with leaves below `min_shard_elements`: those are whole, every other is exactly 1/N."""
    train_step, make_state = tiny.make(engine, loss=small_gpt.mean_loss)
    step = jzero.shard(train_step, stage=stage, mesh=meshes.make(mesh), min_shard_elements=small_gpt.MIN_SHARD_ELEMENTS)
    options = {"engine": engine, "stage": stage, "num_shards": meshes.MESHES[mesh]["data"]}
    least = small_gpt.MIN_SHARD_ELEMENTS
    check_at_rest(step.place(make_state(small_gpt.make_params(tied=False))), min_shard_elements=least, **options)
    born = step.init(lambda: make_state(small_gpt.make_params(tied=False)))
    check_at_rest(born, min_shard_elements=least, **options)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_leaves_that_stay_whole_are_counted_whole_and_named(engine):
    """`data` of 8 divides no dim of a leaf: it rests whole, formula and measurement agree, and a finding names it."""
    train_step, make_state = tiny.make(engine)
    step = jzero.shard(train_step, stage=3, mesh=meshes.make("8"), min_shard_elements=1)
    params = {"up": jnp.ones((25, 47)), "bias": jnp.zeros(47), "down": jnp.ones((47, 25))}
    state = step.place(make_state(params))
    report = step.report(state, tiny.batch(width=25)).to_dict()
    num_bytes = 4 * (25 * 47 + 47 + 47 * 25)
    assert report["bytes_at_rest"]["params"] == {"measured": num_bytes, "formula": num_bytes}
    assert sum(on_device(leaf, 0) for leaf in parts(state)["params"]) == num_bytes
    for name in params:
        assert any(f"params/{name} " in finding and "stays whole" in finding for finding in report["findings"]), report[
            "findings"
        ]
