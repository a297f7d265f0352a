"""Every example runs as a user runs it, says what the one line bought, compiles once, and gives its old state's memory back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRETRAIN = ROOT / "examples" / "pretrain.py"
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {PRETRAIN})

# Runs the example, then one more step in the same process.
AND_ONE_MORE_STEP = """
import pathlib, runpy, sys
import jax

sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))  # as `python examples/equinox.py` does
example = runpy.run_path(sys.argv[1])
step, state, window = example["step"], example["state"], example["window"]

compiled = []
listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
jax.monitoring.register_event_duration_secs_listener(listen)
arrays = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
buffers = lambda tree: {shard.data.unsafe_buffer_pointer() for leaf in arrays(tree) for shard in leaf.addressable_shards}

before, shardings, old = buffers(state), [leaf.sharding for leaf in arrays(state)], state
state, _ = step(state, window)
jax.block_until_ready(arrays(state))
assert not compiled, f"a step that had run before compiled again: {compiled}"
assert [leaf.sharding for leaf in arrays(state)] == shardings, "the step moved its state"
assert all(leaf.is_deleted() for leaf in arrays(old)), "the old state was not donated"
on_device = [leaf for leaf in arrays(state) if leaf.sharding.memory_kind == "device"]  # what moves is put where there is room
assert buffers(on_device) <= before, "the new state lies in new memory"

jax.jit(lambda x: x + 1)(1.0)
assert compiled, "the listener hears nothing, so it proved nothing"
"""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example):
    command = [sys.executable, "-W", "error", "-c", AND_ONE_MORE_STEP, str(example)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 devices, stage 3" in done.stdout
    sharded_mb, whole_mb = re.search(r"state per device: (\S+) MB instead of (\S+) MB", done.stdout).groups()
    assert float(sharded_mb) < float(whole_mb) / 7, "stage 3 on eight devices leaves about an eighth on each"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["dict", "equinox", "linen", "nnx"])
def test_any_library_s_step_keeps_its_optimizer_s_state_in_host_memory(library, tmp_path):
    """The example with one more argument prints the same losses."""
    source, line = (ROOT / "examples" / f"{library}.py").read_text(), "jzero.shard(train_step, stage=3"
    assert line in source
    moved = tmp_path / "example.py"
    moved.write_text(source.replace(line, f'{line}, offload=jzero.Offload(opt_state="host")'))
    outputs = []
    for script in (ROOT / "examples" / f"{library}.py", moved):
        environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    on_device, elsewhere = ([float(loss) for loss in re.findall(r"^\d\.\d{4} .*$", out, re.M)[0].split()] for out in outputs)
    assert len(on_device) >= 20
    assert elsewhere == pytest.approx(on_device, abs=1e-3)


# The training loop that people copy -----------------------------------------------------------------------------------------


class Pretraining:
    """One command, started as often as needed. Compiled programs are kept beside it, so that a second start is cheap."""

    def __init__(self, folder, name, *options):
        small = ["--layers", "1", "--batch", "8", "--seq", "16", "--steps", "40", "--save-every", "4", "--eval-every", "40"]
        self.command = [sys.executable, str(PRETRAIN), "--out", name, *small, *options]
        self.out, self.folder = folder / name, folder
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }

    def start(self):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.command, cwd=self.folder, env=self.environ, text=True, **pipe)

    def finish(self):
        job = self.start()
        printed, _ = job.communicate(timeout=300)
        assert job.returncode == 0, printed
        return printed

    def end_at_the_next_checkpoint(self, number):
        newest, job, deadline = self.newest(), self.start(), time.monotonic() + 300
        while self.newest() == newest:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        job.send_signal(number)
        printed, _ = job.communicate(timeout=60)
        return job.returncode, printed

    def newest(self):
        """The number of the newest checkpoint, 0 if there is none."""
        return max((int(path.name) for path in self.out.glob("checkpoints/*") if path.name.isdigit()), default=0)

    def lines(self):
        file = self.out / "metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("ends", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM]])
def test_pretraining_resumes_by_the_same_command(tmp_path, ends):
    """Killed, told to end, started again and again: every number of every step is the uninterrupted run's, bit by bit."""
    whole, broken = Pretraining(tmp_path, "whole"), Pretraining(tmp_path, "broken")
    assert "2 devices, stage 3" in whole.finish()
    rows = [json.loads(line) for line in whole.lines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 1
    assert list(whole.out.glob("events.out.tfevents.*"))

    for number in ends:
        before = broken.newest()
        code, printed = broken.end_at_the_next_checkpoint(number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 143), printed
        assert 0 < broken.newest() < 40
        assert not before or f"resumed at step {before}" in printed
        if number == signal.SIGTERM:
            saved = int(re.search(r"told to end: saved step (\d+)", printed)[1])
            assert len(broken.lines()) == saved == broken.newest()
    assert f"resumed at step {broken.newest()}" in broken.finish()
    assert broken.lines() == whole.lines()
