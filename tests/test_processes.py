"""Checkpoints of real processes: written by some number of them, restored by any other; and a worker that dies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero

ROOT = Path(__file__).parent.parent
MODEL = """
import json, os, signal, sys, jax, jax.numpy as jnp, numpy as np, optax, jzero, jzero.launch
from jax.experimental import multihost_utils
assert jzero.launch.initialize()
rank, again = jax.process_index(), int(os.environ["JZERO_RESTART"])

def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - x) ** 2)

def make_params():
    keys = jax.random.split(jax.random.key(1))
    return {"up": jax.random.normal(keys[0], (24, 48)) / 5, "down": jax.random.normal(keys[1], (48, 24)) / 7}

def batch(i):
    data = np.random.default_rng((5, i)).normal(size=(24, 24)).astype(np.float32)
    return jax.make_array_from_callback(data.shape, jax.NamedSharding(step.mesh, jax.P("data")), data.__getitem__)

train_step = jzero.make_train_step(loss_fn, optax.adamw(1e-2))
step = jzero.shard(train_step, stage=3, min_shard_elements=64)
manager = jzero.CheckpointManager("run", every=2, keep=3, step=step)
"""
# What a run leaves behind: its state whole, by leaf, and three more losses.
TELL = """
def tell(state, i, name):
    # the leaves whole on the host; three more steps; written by rank 0
    words = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaves = [np.asarray(multihost_utils.process_allgather(words(leaf), tiled=True)) for leaf in jax.tree.leaves(state)]
    losses = []
    for next in range(i + 1, i + 4):
        state, metrics = step(state, batch(next))
        losses.append(float(metrics["loss"]))
    if rank == 0:
        np.savez(name, *leaves)
        open(name + ".json", "w").write(json.dumps(losses))
"""
SAVE = """
state = step.init(train_step.init, make_params)
for i in (1, 2):
    state, _ = step(state, batch(i))
    manager.save(i, state, data={"next": i + 1})
manager.wait()
tell(state, 2, "saved")
"""
RESTORE = """
state, data = manager.restore(step)
assert (manager.restored, data) == (2, {"next": 3})
tell(state, 2, "restored")
"""
RUN = """
state, first = manager.restore(step) if manager.steps() else (step.init(train_step.init, make_params), 1)
print("from", first, "of", jax.process_count())
for i in range(first, 13):
    state, metrics = step(state, batch(i))
    if rank == 0:
        print("loss", i, float(metrics["loss"]).hex())
    manager.save(i, state, data=i + 1)
    if [rank, i, again] == json.loads(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
manager.wait()
"""


def launch(folder, script, *options, words=()):
    (folder / "train.py").write_text(script)
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "jzero.launch", *options, "train.py", *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        leaves = [file[key] for key in file.files]
    return leaves, json.loads((folder / f"{name}.json").read_text())


def in_this_process(num_devices):
    """The same step on some devices of the tests' own process."""
    names = {"__name__": "model"}
    source = MODEL.replace("assert jzero.launch.initialize()\n", "").replace('int(os.environ["JZERO_RESTART"])', "0")
    exec(source.partition("train_step =")[0], names)
    train_step = jzero.make_train_step(names["loss_fn"], optax.adamw(1e-2))
    mesh = jzero.make_mesh(data=num_devices, devices=jax.devices()[:num_devices])
    names["step"] = jzero.shard(train_step, stage=3, mesh=mesh, min_shard_elements=64)
    return names["step"], names["batch"]


def check_in_this_process(folder, num_devices):
    leaves, losses = told(folder, "saved")
    step, batch = in_this_process(num_devices)
    state, data = jzero.CheckpointManager(folder / "run").restore(step)
    words = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    restored = [np.asarray(words(leaf)) for leaf in jax.tree.leaves(state)]
    assert data == {"next": 3}
    assert [leaf.tobytes() for leaf in restored] == [leaf.tobytes() for leaf in leaves]
    found = []
    for i in (3, 4, 5):
        state, metrics = step(state, batch(i))
        found.append(float(metrics["loss"]))
    assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_by_processes_and_restored_by_one(tmp_path, num_processes):
    launch(tmp_path, MODEL + TELL + SAVE, "-n", str(num_processes))
    notes = json.loads((tmp_path / "run" / "2" / "jzero" / "metadata").read_text())
    assert (notes["num_processes"], notes["mesh"]) == (num_processes, {"data": num_processes})
    for num_devices in (1, 2, 8):
        check_in_this_process(tmp_path, num_devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "restored"),
    [(("-n", "2"), ("-n", "4")), (("-n", "4"), ("-n", "2")), (("-n", "4"), ("-n", "2", "--devices-per-process", "4")),
     (("-n", "2", "--devices-per-process", "2"), ("-n", "3"))],
    ids=lambda words: "x".join(word for word in words if word.isdigit()),
)  # fmt: skip
def test_saved_by_some_and_restored_by_other_processes(tmp_path, saved, restored):
    launch(tmp_path, MODEL + TELL + SAVE, *saved)
    launch(tmp_path, MODEL + TELL + RESTORE, *restored)
    (before, losses), (after, continued) = told(tmp_path, "saved"), told(tmp_path, "restored")
    assert [leaf.tobytes() for leaf in after] == [leaf.tobytes() for leaf in before]
    assert continued == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_worker_dies_and_the_job_comes_back(tmp_path):
    """With all four again: the very same losses. With the three that are left: as near as another summation order allows."""
    whole, same, fewer = (tmp_path / name for name in ("whole", "same", "fewer"))
    for folder in (whole, same, fewer):
        folder.mkdir()
    script, dies = MODEL + RUN, json.dumps([1, 7, 0])
    again = ("-n", "4", "--max-restarts", "1", "--backoff", "0.1")
    curves = {}
    printed = launch(whole, script, "-n", "4", words=["[]"])
    curves["whole"] = re.findall(r"\[0\] loss (\d+) (\S+)", printed)
    assert [int(i) for i, _ in curves["whole"]] == list(range(1, 13))

    for name, folder, options, num_left in (("same", same, again, 4), ("fewer", fewer, (*again, "--min-processes", "3"), 3)):
        printed = launch(folder, script, *options, words=[dies])
        starts = re.findall(r"\[0\] from (\d+) of (\d)", printed)
        assert [int(num) for _, num in starts] == [4, num_left], printed
        assert int(starts[1][0]) in (5, 7), "from the newest complete checkpoint: 6, or 4 if 6 was still being written"
        curves[name] = re.findall(r"\[0\] loss (\d+) (\S+)", printed)
        assert int(curves[name][-1][0]) == 12
    assert set(curves["same"]) == set(curves["whole"])  # steps that were run twice gave the same bits twice
    expected = {i: float.fromhex(loss) for i, loss in curves["whole"]}
    for i, loss in curves["fewer"]:
        assert float.fromhex(loss) == pytest.approx(expected[i], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", ["", "bucket_bytes=2500", 'update="host", bucket_bytes=2500'], ids=["whole leaves", "slices", "by the hosts"]
)
def test_offload_in_processes(tmp_path, asked):
    """Moments and masters in each process's own host memory: the losses are those of one process on the device."""
    asked = f'offload=jzero.Offload(opt_state="host", params="host", {asked})'
    script = MODEL.replace("min_shard_elements=64)", f"min_shard_elements=64, {asked})")
    launch(tmp_path, script + TELL + SAVE, "-n", "2", "--devices-per-process", "2")
    check_in_this_process(tmp_path, 4)
