"""Portability law: a checkpoint of any layout restores into any other, bitwise, and trains on as if nothing had happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pairwise
import pytest
import tiny
from test_stability import compilations, kinds, pointers

import jzero

SIZES = {"1": {}, "2": {"data": 2}, "3": {"data": 3}, "4": {"data": 4}, "8": {"data": 8}, "2x4": {"replica": 2, "data": 4}}
LAYOUTS = {"stage": (0, 1, 2, 3), "mesh": tuple(SIZES)}
FACTORS = {f"{when}_{name}": values for when in ("from", "to") for name, values in LAYOUTS.items()} | {"engine": tiny.ENGINES}
NUM_STEPS = 2


@functools.cache
def make(engine, stage, mesh):
    """A step of each layout, shared by tests, so that each is compiled once."""
    train_step, make_state = tiny.make(engine)
    sizes = {"data": 1, **SIZES[mesh]}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    step = jzero.shard(train_step, stage=stage, mesh=jzero.make_mesh(**sizes, devices=devices), min_shard_elements=64)
    return step, make_state


@functools.cache
def trained(engine):
    """A state two steps into training, on one device."""
    step, make_state = make(engine, 0, "1")
    state = step.place(make_state(tiny.make_params()))
    for _ in range(2):
        state, _ = step(state, tiny.batch())
    return state


def values(state):
    """As bytes, so that equal means bitwise."""
    keys = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [np.asarray(keys(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def losses(step, state):
    found = []
    for _ in range(NUM_STEPS):
        state, aux = step(state, tiny.batch())
        found.append(np.asarray(aux["loss"] if isinstance(aux, dict) else aux))
    return found


def check(tmp_path, entry):
    source, _ = make(entry["engine"], entry["from_stage"], entry["from_mesh"])
    step, _ = make(entry["engine"], entry["to_stage"], entry["to_mesh"])
    state = source.place(trained(entry["engine"]))
    manager = jzero.CheckpointManager(tmp_path / "run")
    manager.save(2, state)
    manager.wait()
    step.known = None  # as in a fresh process
    restored, _ = jzero.CheckpointManager(tmp_path / "run").restore(step)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert values(restored) == values(state)
    placed = step.place(trained(entry["engine"]))
    assert kinds(restored) == kinds(placed)
    assert losses(step, restored) == losses(step, placed)  # the same mesh, so bitwise


SAMPLE = [entry for entry in pairwise.pairwise(FACTORS)[::4] if entry["engine"] == "opaque"]  # composed: the matrix


@pytest.mark.parametrize("entry", SAMPLE, ids=pairwise.label)
def test_any_layout_restores_into_another(tmp_path, entry):
    check(tmp_path, entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", pairwise.pairwise(FACTORS), ids=pairwise.label)
def test_every_pair_of_layouts(tmp_path, entry):
    check(tmp_path, entry)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_donation_works_after_restore(tmp_path, engine):
    """The step that was compiled before takes the restored state as its own: no second program, memory written over."""
    step, _ = make(engine, 3, "8")
    state, _ = step(step.place(trained(engine)), tiny.batch())
    jzero.save(tmp_path / "one", state)
    restored = jzero.restore(tmp_path / "one", step)
    old, before = restored, pointers(restored)
    with compilations() as seen:
        state, _ = jax.block_until_ready(step(restored, tiny.batch()))
    assert not seen
    assert len(step._programs) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert pointers(state) == before


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_training_goes_on_while_a_save_is_written(tmp_path, engine):
    """The next steps donate the very buffers that are being saved; what lands on disk is the state as it was."""
    step, _ = make(engine, 3, "8")
    state = step.place(trained(engine))
    manager = jzero.CheckpointManager(tmp_path)
    for i in range(3):
        expected = values(state)
        manager.save(i, state)
        for _ in range(3):
            state, _ = step(state, tiny.batch())
        restored, _ = manager.restore(step, at=i)
        assert values(restored) == expected


def test_plain_orbax_reads_it_to_numpy(tmp_path):
    step, _ = make("composed", 3, "8")
    state = step.place(trained("composed"))
    jzero.save(tmp_path / "one", state)
    item = ocp.PyTreeCheckpointer().metadata(tmp_path / "one" / "state").item_metadata
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item.tree)
    read = ocp.PyTreeCheckpointer().restore(tmp_path / "one" / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    assert isinstance(read["params"]["up"], np.ndarray)
    assert np.array_equal(read["params"]["up"], state.params["up"])
    assert np.array_equal(read["opt_state"]["0"]["mu"]["down"], state.opt_state[0].mu["down"])
    assert np.array_equal(read["rng"], jax.random.key_data(state.rng))


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_plain_orbax_checkpoint_is_adopted(tmp_path, engine):
    """Written by StandardCheckpointer from the state of a plain loop, typed key, named tuples and all."""
    plain = trained(engine)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", plain)
    step, _ = make(engine, 3, "8")
    step.known = None
    if engine == "opaque":  # a plain checkpoint does not say what optimizer wrote it
        with pytest.raises(ValueError, match="structure of the state is not known"):
            jzero.restore(tmp_path / "plain", step)
        step.shardings(jax.eval_shape(lambda: plain))
    restored = jzero.restore(tmp_path / "plain", step)
    assert values(restored) == values(plain)
    assert losses(step, restored) == losses(step, step.place(plain))


def test_precision_changes_only_when_asked(tmp_path):
    train_step, _ = tiny.make("composed", precision="bf16-pure")
    step = jzero.shard(train_step, stage=3, min_shard_elements=64)
    jzero.save(tmp_path / "one", trained("composed"))
    with pytest.raises(ValueError, match=r"(?s)params/up +float32\[24,48\] +the step expects bfloat16.*cast=True"):
        jzero.restore(tmp_path / "one", step)
    restored = jzero.restore(tmp_path / "one", step, cast=True)
    wanted = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), trained("composed").params, restored.params)
    assert restored.params["up"].dtype == jnp.bfloat16
    assert values(restored.params) == values(wanted)
