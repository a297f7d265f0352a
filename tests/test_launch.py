"""The launcher with real processes: codes, prefixes, restarts, preemption, hanging steps, ranks that run something else."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = (
    "import os, sys, time, signal; rank = int(os.environ['OMPI_COMM_WORLD_RANK']); again = int(os.environ['JZERO_RESTART'])\n"
)
JOINED = """
import signal, sys, time, jax, jax.numpy as jnp, numpy as np, optax, jzero, jzero.launch, jzero.preemption
assert jzero.launch.initialize()
rank = jax.process_index()
train = jzero.make_train_step(lambda p, x: jnp.mean((x @ p["w"]) ** 2), optax.adam(1e-3))
step = jzero.shard(train, stage=3)
state = step.init(train.init, lambda: {"w": jnp.ones((64, 64))})
def batch(rows):
    data, sharding = np.ones((rows, 64), np.float32), jax.NamedSharding(step.mesh, jax.P("data"))
    return jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
"""


def start(tmp_path, script, *options, words=()):
    (tmp_path / "train.py").write_text(script)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jzero.launch", *options, "train.py", *words]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def run(tmp_path, script, *options, words=()):
    job = start(tmp_path, script, *options, words=words)
    out, _ = job.communicate(timeout=120)
    return job.returncode, out


def test_lines_are_prefixed_and_all_well_is_zero(tmp_path):
    code, out = run(tmp_path, PLAIN + "print('hello'); print('x' * 3_000_000)", "-n", "3")
    assert code == 0
    assert {f"[{rank}] hello" for rank in range(3)} <= set(out.splitlines())
    assert out.count("x") >= 9_000_000


@pytest.mark.parametrize(("how", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_one_death_ends_all_with_its_code(tmp_path, how, code):
    began = time.monotonic()
    got, out = run(tmp_path, PLAIN + f"if rank == 1: {how}\ntime.sleep(100)", "-n", "3")
    assert got == code, out
    assert time.monotonic() - began < 50


@pytest.mark.parametrize(("least", "expected"), [(None, ["4", "4"]), ("3", ["4", "3"])])
def test_restart_with_all_or_with_what_is_left(tmp_path, least, expected):
    script = PLAIN + "print('of', os.environ['OMPI_COMM_WORLD_SIZE'])\nif again: sys.exit(0)\n"
    script += "time.sleep(1)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)"
    options = ["--min-processes", least] if least else []
    code, out = run(tmp_path, script, "-n", "4", "--max-restarts", "1", "--backoff", "0.1", *options)
    assert code == 0, out
    assert re.findall(r"\[0\] of (\d)", out) == expected


@pytest.mark.parametrize("peers", ["raise SystemExit(1)", "os.abort()"])
def test_peers_that_fail_with_a_lost_rank_are_not_lost(tmp_path, peers):
    """What a collective does on the others a moment after a rank is gone: three of four are left, not one."""
    script = PLAIN + "print('of', os.environ['OMPI_COMM_WORLD_SIZE'])\nif again: sys.exit(0)\n"
    script += "while time.time() < float(sys.argv[1]): time.sleep(0.001)\n"
    script += f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nif rank < 3: {peers}\ntime.sleep(100)"
    options = ["-n", "4", "--max-restarts", "1", "--backoff", "0.1", "--min-processes", "3"]
    code, out = run(tmp_path, script, *options, words=[str(time.time() + 5)])
    assert code == 0, out
    assert re.findall(r"\[0\] of (\d)", out) == ["4", "3"], out


def test_restarts_are_limited(tmp_path):
    code, out = run(tmp_path, PLAIN + "sys.exit(3)", "-n", "2", "--max-restarts", "2", "--backoff", "0.1")
    assert code == 3
    assert out.count("restart ") == 2


def test_grace_ends_in_sigkill(tmp_path):
    job = start(tmp_path, PLAIN + "signal.signal(15, signal.SIG_IGN)\nprint('up')\ntime.sleep(100)", "-n", "2", "--grace", "1")
    assert "up" in job.stdout.readline() + job.stdout.readline()
    job.terminate()
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 137, out


def test_bad_usage(tmp_path):
    job = subprocess.run([sys.executable, "-m", "jzero.launch", "-n", "0", "none.py"], capture_output=True, text=True, cwd=ROOT)
    assert job.returncode == 2
    assert "-n 0: not positive" in job.stderr
    assert "none.py: there is no such file" in job.stderr


def test_sigterm_makes_all_ranks_save_at_one_step(tmp_path):
    script = JOINED + "preemption, x = jzero.preemption.watch(), batch(8)\nfor i in range(10_000):\n"
    script += "    state, metrics = step(state, x); float(metrics['loss']); print('step', i)\n"
    script += "    if preemption.reached(i): print('saving', i); sys.exit(preemption.code)\n"
    job = start(tmp_path, script, "-n", "2")
    while "step 3" not in job.stdout.readline():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 143, out
    saved = re.findall(r"saving (\d+)", out)
    assert len(saved) == 2
    assert len(set(saved)) == 1, saved


def test_a_hanging_step_shows_all_ranks(tmp_path):
    script = JOINED + "x = batch(8)\ndef lost(): time.sleep(1000)\n"
    script += (
        "for i in range(9):\n    state, metrics = step(state, x); float(metrics['loss'])\n    if rank == 1 and i == 2: lost()\n"
    )
    code, out = run(tmp_path, script, "-n", "2", "--step-timeout", "3")
    assert code == 124, out
    assert "a step did not end within 3 s" in out
    assert re.search(r"\[0\] .*watch.py", out)
    assert re.search(r"\[1\] .*in lost", out), out


def test_an_odd_rank_is_named(tmp_path):
    code, out = run(tmp_path, JOINED + "step(state, batch(24 if rank == 1 else 12))", "-n", "3")
    assert code == 1, out
    assert "rank 1 of 3 would run another step" in out
    assert "float32[24,64]" in out


def test_an_exception_on_one_rank_ends_the_job_at_once(tmp_path):
    began = time.monotonic()
    script = JOINED + "x = batch(8)\nfor i in range(9):\n    state, metrics = step(state, x)\n"
    code, out = run(tmp_path, script + "    if rank == 1 and i == 2: raise RuntimeError('oops')", "-n", "2")
    assert code == 1, out
    assert "oops" in out
    assert time.monotonic() - began < 60
