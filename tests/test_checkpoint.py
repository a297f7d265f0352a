"""Checkpoints: what a manager keeps, what lies beside the arrays, and every fault that a disk or a user can bring."""

import json
import os
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import jzero
from jzero.checkpoint.checksums import CorruptCheckpoint
from jzero.checkpoint.main import main


def make_step(**options):
    train_step = jzero.make_train_step(
        lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2), optax.adam(1e-2), **options
    )
    return jzero.shard(train_step, stage=3, min_shard_elements=8)


def make_params(width=32):
    return {"w": jax.random.normal(jax.random.key(0), (width, width)), "b": jnp.zeros(width)}


def make_state(step, width=32):
    return step.init(lambda: step.fn.init(make_params(width)))


@pytest.fixture(scope="module")
def step():
    return make_step()


@pytest.fixture(scope="module")
def state(step):
    return make_state(step)


@pytest.fixture(scope="module")
def written(tmp_path_factory, step, state):
    """Checkpoints 1 and 2, copied by tests that damage them."""
    manager = jzero.CheckpointManager(tmp_path_factory.mktemp("written"), step=step)
    manager.save(1, state, data={"epoch": 3})
    manager.save(2, state, data={"epoch": 4})
    manager.wait()
    return manager.path


@pytest.fixture
def run(tmp_path, written):
    return shutil.copytree(written, tmp_path / "run")


def same(one, other):
    """Bit by bit: -0.0, NaN and denormals too."""
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return all(
        np.asarray(plain(a)).tobytes() == np.asarray(plain(b)).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def largest(folder):
    """The file that holds the numbers."""
    return max(folder.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# What is kept --------------------------------------------------------------------------------------------------------------


def test_every_keep_and_force(tmp_path, state):
    manager = jzero.CheckpointManager(tmp_path, every=2, keep=2)
    assert [manager.save(i, state) for i in range(5)] == [True, False, True, False, True]
    assert manager.save(5, state, force=True)
    assert not manager.save(5, state, force=True)
    manager.close()
    assert manager.steps() == [4, 5]
    assert not [*tmp_path.glob("*tmp*"), *tmp_path.glob(".jzero-deleted")], "what is not kept is deleted, not only moved"


@pytest.mark.parametrize(("best", "kept"), [("loss", [1, 3]), ("+loss", [0, 3])])
def test_best_keeps_the_best_and_the_newest(tmp_path, state, best, kept):
    manager = jzero.CheckpointManager(tmp_path, keep=1, best=best)
    for i, loss in enumerate((3.0, 1.0, 2.0, 2.5)):
        manager.save(i, state, metrics={"loss": jnp.asarray(loss)})
    manager.wait()
    assert manager.steps() == kept
    with pytest.raises(ValueError, match="needs its value with every save"):
        manager.save(9, state)


class Iterator:
    def __init__(self):
        self.position = {"shard": 0, "next": np.int64(5), "opaque": b"\x00\xff"}

    def get_state(self):
        return self.position

    def set_state(self, position):
        self.position = position


def test_the_data_position_comes_back(tmp_path, step, state):
    manager = jzero.CheckpointManager(tmp_path)
    manager.save(0, state, data=Iterator())
    _, position = manager.restore(step)
    assert position == {"shard": 0, "next": 5, "opaque": b"\x00\xff"}
    iterator = Iterator()
    iterator.position = None
    assert manager.restore(step, data=iterator)[1] is iterator
    assert iterator.position == position
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        manager.save(1, state, data=object())


def test_notes_beside_the_arrays(written):
    notes = json.loads((written / "2" / "jzero" / "metadata").read_text())
    assert (notes["format"], notes["step"], notes["stage"], notes["mesh"]) == (1, 2, 3, {"data": 8})
    assert notes["versions"]["jax"] == jax.__version__
    assert notes["precision"]["compute"] == "float32"


def test_a_run_that_went_back_writes_later_checkpoints_again(run, step, state):
    manager = jzero.CheckpointManager(run)
    with pytest.raises(FileExistsError, match="checkpoint 2 exists, and this run did not write it"):
        manager.save(2, state)
    manager.restore(step, at=1)
    other = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + 1, state)
    assert manager.save(2, other)
    assert same(manager.restore(step, at=2)[0], other)


def test_static_leaves_come_from_the_step(tmp_path):
    def make():
        return {"params": eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(0)), "rng": jax.random.key(3, impl="rbg")}

    sharded = jzero.shard(lambda state, x: (state, None), stage=3, min_shard_elements=8, params=lambda state: state["params"])
    state = sharded.place(make())
    jzero.save(tmp_path / "one", state)
    restored = jzero.restore(tmp_path / "one", sharded)
    assert restored["params"].activation is state["params"].activation
    assert same(eqx.filter(restored, eqx.is_array), eqx.filter(state, eqx.is_array))
    fresh = jzero.shard(sharded.fn, stage=3, min_shard_elements=8, params=lambda state: state["params"])
    with pytest.raises(ValueError, match=r"(?s)structure of the state is not known.*step\.init\(make_state\)"):
        jzero.restore(tmp_path / "one", fresh)


def test_weights_only(run, step, state):
    manager = jzero.CheckpointManager(run)
    fresh, data = manager.restore(make_step(), weights_only=True)
    assert data is None
    assert same(fresh.params, state.params)
    assert int(fresh.step) == 0
    opaque = jzero.shard(lambda state, x: (state, None), stage=3, min_shard_elements=8)
    with pytest.raises(ValueError, match="needs the other leaves of the state"):
        manager.restore(opaque, weights_only=True)


def test_export_to_safetensors(run, state, tmp_path):
    assert jzero.export(run, tmp_path / "model.safetensors") == ["b", "w"]
    read = load_file(tmp_path / "model.safetensors")
    assert same(read, {name: np.asarray(leaf) for name, leaf in state.params.items()})
    jzero.export(run, tmp_path / "all.safetensors", only="opt_state/0/mu")
    assert same(load_file(tmp_path / "all.safetensors"), state.opt_state[0].mu)
    with pytest.raises(ValueError, match="no leaves under 'model'"):
        jzero.export(run, tmp_path / "none.safetensors", only="model")


# Faults --------------------------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(tmp_path, step):
    with pytest.raises(FileNotFoundError, match=r"(?s)no checkpoint folder.*does not exist"):
        jzero.restore(tmp_path / "nothing", step)
    with pytest.raises(FileNotFoundError, match=r"(?s)no complete checkpoint.*holds no checkpoint"):
        jzero.CheckpointManager(tmp_path).restore(step)


def test_an_unfinished_save_is_invisible(run, step):
    shutil.copytree(run / "2", run / "3.orbax-checkpoint-tmp")
    (run / "3.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    manager = jzero.CheckpointManager(run)
    assert manager.steps() == [1, 2]
    assert manager.restore(step)[1] == {"epoch": 4}


def test_unknown_step(run, step):
    with pytest.raises(FileNotFoundError, match=r"(?s)no checkpoint of step 7.*steps there: 1, 2.*at=2"):
        jzero.CheckpointManager(run).restore(step, at=7)


def test_tree_mismatch_lists_every_leaf(run):
    step = make_step()
    step.init(lambda: step.fn.init({"w": jnp.ones((32, 16)), "bias": jnp.zeros(32)}))
    with pytest.raises(ValueError, match="leaves do not match: 3 missing, 3 extra, 3 differ") as caught:
        jzero.CheckpointManager(run).restore(step)
    for line in ("params/bias", "params/b ", "params/w", "opt_state/0/mu/w", "weights_only=True", "partial=True"):
        assert line in str(caught.value)
    assert r"rename={r'\bb$': 'bias'}" in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "notes", "index"])
def test_damaged_files_are_named_and_can_be_fallen_back_from(run, step, state, damage):
    file = {"notes": run / "2/jzero/metadata", "index": run / "2/state/_METADATA"}.get(damage, largest(run / "2"))
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        flip(file)
    manager = jzero.CheckpointManager(run)
    with pytest.raises(CorruptCheckpoint, match=file.name):
        manager.restore(step)
    with pytest.warns(UserWarning, match=r"(?s)damaged|cannot be read.*Falling back from checkpoint 2 to 1"):
        restored, data = manager.restore(step, on_corrupt="previous")
    assert data == {"epoch": 3}
    assert same(restored, state)


def test_orbax_alone_does_not_notice_a_flipped_weight(tmp_path):
    """Why there is a list of checksums: this fails when Orbax learns it, and the list can go."""
    weights = jax.random.normal(jax.random.key(0), (64, 64))
    jzero.save(tmp_path / "one", {"w": weights})
    flip(largest(tmp_path / "one"))
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        read = ocp.PyTreeCheckpointer().restore(tmp_path / "one" / "state")
    assert read["w"].shape == weights.shape
    assert not same(read, {"w": weights})


def test_no_permission_to_write(tmp_path, state):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    tmp_path.chmod(0o755)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)  # root may write anywhere; nobody may not
    try:
        with pytest.raises(PermissionError, match="cannot write into this folder"):
            jzero.CheckpointManager(folder).save(0, state)
    finally:
        if was_root:
            os.seteuid(0)


def test_a_newer_format(run, step):
    file = run / "2/jzero/metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2, "more": "than we know"}))
    with pytest.raises(ValueError, match=r"has format 2, this jzero reads up to 1") as caught:
        jzero.CheckpointManager(run).restore(step, on_corrupt="previous")
    assert not isinstance(caught.value, CorruptCheckpoint)


def test_states_that_cannot_be_saved(tmp_path, step, state):
    copy = step.place(state)
    step(copy, np.ones((8, 32), np.float32))
    with pytest.raises(ValueError, match="were donated to a step already"):
        jzero.CheckpointManager(tmp_path).save(0, copy)
    jzero.save(tmp_path / "one", state)
    with pytest.raises(FileExistsError, match="something already"):
        jzero.save(tmp_path / "one", state)


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": -1}, {"best": ""}])
def test_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        jzero.CheckpointManager(tmp_path, **options)


# The command ---------------------------------------------------------------------------------------------------------------


def command(capsys, *words):
    status = main([*map(str, words), "--json"])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if printed.out else printed.err


def test_the_command(run, tmp_path, capsys, state):
    status, rows = command(capsys, "ls", run)
    assert status == 0
    assert [(row["checkpoint"], row["stage"], row["data"]) for row in rows] == [
        ("1", 3, [{"epoch": 3}]),
        ("2", 3, [{"epoch": 4}]),
    ]
    assert command(capsys, "diff", run / "1", run / "2") == (0, [])
    assert command(capsys, "export", run, tmp_path / "m.safetensors")[0] == 0
    assert same(load_file(tmp_path / "m.safetensors"), {name: np.asarray(leaf) for name, leaf in state.params.items()})
    jzero.save(tmp_path / "other", {**state._asdict(), "step": state.step + 1})
    status, rows = command(capsys, "diff", run, tmp_path / "other")
    assert (status, [row["leaf"] for row in rows], rows[0]["note"]) == (1, ["step"], "1 bytes differ")
    flip(largest(run / "2"))
    status, rows = command(capsys, "verify", run)
    assert (status, [row["result"] for row in rows]) == (1, ["whole", "damaged"])
    assert largest(run / "2").name in rows[1]["message"]
    status, error = command(capsys, "ls", tmp_path / "nothing")
    assert status == 2
    assert "does not exist" in error
    assert main(["ls", str(run)]) == 0
