"""Faults of the disk and of other jobs, brought about for real: no space, files too large, no permission, a folder in use."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero
from jzero.checkpoint import lock, writing
from jzero.checkpoint.checksums import CorruptCheckpoint

ROOT = Path(__file__).parent.parent
# Orbax's threads that failed with the first are dropped unread, and Python says so when it collects them.
drops_threads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SMALL, LARGE = 64, 1024  # widths: 33 kB and 8.4 MB of state
ROOM_BYTES = 3_000_000


@pytest.fixture
def step():
    train_step = jzero.make_train_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), optax.sgd(1e-2, momentum=0.9))
    return jzero.shard(train_step, stage=3, min_shard_elements=8)


def make_state(step, width):
    return step.init(lambda: step.fn.init({"w": jax.random.normal(jax.random.key(0), (width, width))}))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 3 MB. Mounting needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "jzero", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_files(tmp_path):
    """No file may grow beyond 3 MB: what a quota does, for users who may not mount."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def weights(state):
    return np.asarray(state.params["w"]).tobytes()


def check_full(folder, step):
    """Stops, as asked by default: an error that names the cause; the checkpoint before is whole, and the next save works."""
    state = make_state(step, SMALL)
    before = weights(state)
    manager = jzero.CheckpointManager(folder / "run", step=step)
    manager.save(1, state)
    manager.wait()

    def fill():
        manager.save(2, make_state(step, LARGE))
        manager.wait()

    with pytest.raises(OSError, match=r"(?s)could not be written.*(No space left|too large).*complete: 1") as caught:
        fill()
    assert "the state in memory is unharmed" in str(caught.value)
    assert manager.steps() == [1]
    step.known = None
    assert weights(jzero.CheckpointManager(folder / "run").restore(step)[0]) == before
    assert manager.save(2, state)  # the half-written one is not in its way
    manager.wait()
    assert manager.steps() == [1, 2]
    assert not [path.name for path in (folder / "run").iterdir() if "tmp" in path.name]
    with pytest.raises(OSError, match=r"(?s)could not be written.*(No space left|too large)"):
        jzero.save(folder / "one", make_state(step, LARGE))
    with pytest.raises((FileNotFoundError, CorruptCheckpoint)):
        jzero.restore(folder / "one", step)
    manager.close()


@drops_threads
def test_a_full_disk(small_disk, step):
    check_full(small_disk, step)


@drops_threads
def test_a_limit_on_files(small_files, step):
    check_full(small_files, step)


@pytest.mark.parametrize("behind", ["", ' {"shape":' + "1" * 400 + "}"])
def test_what_the_system_said_is_kept_of_a_long_message(behind):
    """TensorStore says it at the end, or before a description of the array."""
    said = f'OUT_OF_RANGE: Error writing "step/.zarray"{" in a folder" * 40} [OS error 27: EFBIG File too large]{behind}'
    assert "File too large" in str(writing.failed(ValueError(said), "complete: 1"))


@drops_threads
def test_training_goes_on_when_a_save_fails_if_asked(small_files, step):
    manager = jzero.CheckpointManager(small_files / "run", on_error="warn")
    manager.save(1, make_state(step, SMALL))
    manager.wait()
    state = make_state(step, LARGE)

    def train():
        after = state
        for i in (2, 3):
            manager.save(i, after)
            after, metrics = step(after, np.ones((8, LARGE), np.float32))
        manager.wait()
        return after, metrics

    with pytest.warns(UserWarning, match=r"(?s)could not be written.*complete: 1"):
        state, metrics = train()
    assert np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 2
    assert manager.steps() == [1]
    assert manager.save(4, make_state(step, SMALL))
    manager.wait()
    assert manager.steps() == [1, 4]
    with pytest.raises(ValueError, match="unknown on_error="):
        jzero.CheckpointManager(small_files, on_error="ignore")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_read_only_folder_restores_and_refuses_to_save(tmp_path, step):
    """As another user, whom the permissions bind: root may write anywhere."""
    state = make_state(step, SMALL)
    writer = jzero.CheckpointManager(tmp_path / "run")
    writer.save(1, state)
    writer.close()
    manager = jzero.CheckpointManager(tmp_path / "run")
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        folder.chmod(folder.stat().st_mode | 0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"(?s)cannot write into this folder.*Restoring needs none"):
            manager.save(2, state)
        assert weights(manager.restore(step)[0]) == weights(state)
    finally:
        os.seteuid(0)


WRITER = """
import sys, jax.numpy as jnp, jzero
manager = jzero.CheckpointManager(sys.argv[1])
manager.save(1, {"w": jnp.ones(8)})
manager.wait()
print("written", flush=True)
sys.stdin.read()
"""


def test_two_jobs_and_one_folder(tmp_path, step, monkeypatch):
    """The second is refused while the first lives, may read, and takes over when the first is gone, even by SIGKILL."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environ, text=True, **pipes)
    try:
        assert first.stdout.readline() == "written\n"
        manager = jzero.CheckpointManager(tmp_path)
        with pytest.raises(
            BlockingIOError, match=rf"(?s)another job writes into this folder.*process {first.pid} on"
        ) as caught:
            manager.save(2, make_state(step, SMALL))
        assert "a folder of its own" in str(caught.value)
        (tmp_path / lock.FILE).write_text(
            json.dumps({"host": "elsewhere", "pid": 1})
        )  # a host that may have died: worth a wait
        monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(BlockingIOError, match="process 1 on elsewhere"):
            manager.save(2, make_state(step, SMALL))
        assert time.monotonic() - began > 0.5
        plain = jzero.shard(lambda state, x: (state, None), stage=0, params=lambda state: state)
        assert jzero.restore(tmp_path, plain)["w"].tolist() == [1.0] * 8
    finally:
        first.kill()
        first.communicate()
    assert manager.save(2, make_state(step, SMALL))
    manager.wait()
    assert manager.steps() == [1, 2]


def test_close_lets_others_write(tmp_path, step):
    state = make_state(step, SMALL)
    one, other = jzero.CheckpointManager(tmp_path), jzero.CheckpointManager(tmp_path)
    one.save(1, state)
    other.save(2, state)  # of one process: the first finishes what it writes, and gives way
    one.save(3, state)
    one.close()
    assert one.steps() == [1, 2, 3]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = WRITER.replace("save(1", "save(4").replace("sys.stdin.read()", "")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environ, check=True)
    assert one.steps() == [1, 2, 3, 4]
