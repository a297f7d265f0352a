"""Every example runs as a user runs it, says what the one line bought, compiles once, and gives its old state's memory back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

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
assert buffers(state) <= before, "the new state lies in new memory"

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
