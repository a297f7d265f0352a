"""Disks that are full, slow, without room or in use by another run."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from swapped import assert_same, batch, loss, make_params, make_state, make_step, numbers, shard_file, train

import jzero
from jzero.offload.nvme import direct, folder

ROOM_BYTES = 20_000  # less than a swap file of one slot and its header, more than any header


@pytest.fixture
def small_files():
    """Sets a limit on the size of files: what a full disk or a quota does, at the moment that a test wants it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_in_the_middle_of_a_step(step, small_files):
    """Every state is good after the failure: the files' generation, the parameters on the device, the next step."""
    state, _ = train(step, make_state(step), 1)
    before, unlimited = numbers(state), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    file = shard_file(state.opt_state[0].mu["w3"])
    small_files(file.slot_bytes - direct.ALIGN)  # generation 2 goes into slot 0: the last block of it does not fit
    with pytest.raises(OSError, match=r"(?s)update 2 could not be written.*too large.*after 1 updates is intact.*repeat"):
        step(state, batch(1))
    small_files(unlimited)
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    state.opt_state[0].mu["w3"].swap.verify()
    state, _ = train(step, state, 2, first=1)
    assert_same(state, train(step, make_state(step), 3)[0])


def test_a_disk_without_room_is_found_before_anything_is_made(tmp_path, monkeypatch):
    step = make_step(tmp_path / "swap")
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"(?s)the swap needs [\d,]+ bytes and 100,000 are free.*two generations.*fraction=0\.\d\d"
    ):
        make_state(step)
    assert not list((tmp_path / "swap").rglob("*.bin"))


def test_a_quota_is_found_when_files_are_made(step, small_files):
    small_files(ROOM_BYTES)
    with pytest.raises(OSError, match=r"(?s)the swap's disk could not be tried.*too large.*larger disk"):
        make_state(step)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"(?s)cannot write into the swap folder.*file.*local drive"):
        make_state(make_step(tmp_path / "file" / "swap"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write into the swap folder"):
        make_state(make_step(tmp_path / "swap"))


def test_a_slow_disk_is_said_with_the_time_it_takes(tmp_path, monkeypatch):
    ticks = iter(range(100))
    speed = folder.measure(tmp_path, 2**20, clock=lambda: next(ticks))  # a second for each way
    assert speed.write_bytes_per_s == speed.read_bytes_per_s == 2**20
    assert speed.seconds(2**22, 2**21) == pytest.approx(6)
    assert not (tmp_path / "trial").exists()
    with pytest.warns(UserWarning, match=r"(?s)this disk is slow: each step will wait at least 8.0 s.*writes 1 MB/s"):
        folder.warn_if_slow(tmp_path, speed, 2**22, 2**22)
    monkeypatch.setattr(folder, "measure", lambda path, num_bytes: folder.Speed(10.0, 10.0, True))
    with pytest.warns(UserWarning, match="this disk is slow"):
        make_state(make_step(tmp_path / "swap"))


@pytest.mark.slow
def test_a_file_system_without_direct_io(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *mode, **options):
        if flags & direct._O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(direct.os, "open", refuse)
    assert not folder.measure(tmp_path, 4096).is_direct
    step = make_step(tmp_path / "swap")
    state, _ = train(step, make_state(step), 2)
    state.opt_state[0].mu["w0"].swap.verify()


OTHER_RUN = """
import sys; sys.path[:0] = [{tests!r}]
import swapped as t
step = t.make_step({where!r})
state, _ = t.train(step, t.make_state(step), 2)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that has trained two steps with its swap in `tmp_path / "swap"`."""
    script = OTHER_RUN.format(tests=str(Path(__file__).parent), where=str(tmp_path / "swap"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_swap_folder_of_another_run(tmp_path, other_run, step):
    with pytest.raises(BlockingIOError, match=rf"(?s)swap folder of another run.*in use by process {other_run.pid}"):
        make_state(step)
    other_run.kill()
    other_run.wait()
    (left,) = folder.leftovers(tmp_path / "swap" / "process-0", set())
    assert left.said == "8 leaves at step 2"
    smaller = jzero.make_train_step(loss, optax.adamw(1e-2))
    smaller = jzero.shard(smaller, stage=3, offload=jzero.Offload(opt_state=f"nvme:{tmp_path / 'swap'}"))
    with pytest.raises(ValueError, match=r"(?s)swap folder of another run.*8 leaves at step 2.*Name another folder, or delete"):
        smaller.place(smaller.fn.init(make_params(2)))
    assert left.folder.exists()
    make_state(step)  # the same leaves: this run takes over from the one that died
    assert not left.folder.exists()
    (finding,) = [line for line in step.report(make_state(step), batch()).findings if "taken over" in line]
    assert "8 leaves at step 2" in finding
