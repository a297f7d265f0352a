"""`step.init` makes every leaf in shards: it costs little more than the state, and no sharded leaf is ever whole on a device.

Measured in a process of its own, because a process remembers its peak. Simulated devices share the host's memory, so the
process grows by what all 8 hold. The allowance of 1.4 times the state is issue 2's, for the random generator's temporaries.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import pytest
import tiny

import jzero
from jzero.engine import compiler

ALLOWED = 1.4  # times the state's bytes; issue 2, acceptance 5
ROOT = Path(__file__).parents[2]


def make_params(key, *, width, num_layers, vocab):
    """A stack of transformer layers' matrices and an embedding."""
    shapes = {
        "embed": (vocab, width),
        "qkv": (num_layers, width, 3 * width),
        "out": (num_layers, width, width),
        "up": (num_layers, width, 4 * width),
        "down": (num_layers, 4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: 0.02 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def never_called(params, x):
    raise AssertionError("init computes no loss")


def sharded_step(engine):
    train_step, make_state = tiny.make(engine, loss=never_called)
    return jzero.shard(train_step, stage=3, mesh=meshes.make("8")), make_state


def measure(engine, width, num_layers, vocab):
    """What one `init` adds to this process, the bytes of the state, and the shape of every shard."""
    step, make_state = sharded_step(engine)
    start = jax.jit(lambda key: jax.random.normal(key, (8, 8)))(jax.random.key(0))  # whatever jax allocates on first use
    jax.block_until_ready(start)
    before = peak_bytes()
    make = lambda key: make_state(make_params(key, width=width, num_layers=num_layers, vocab=vocab))
    state = jax.block_until_ready(step.init(make, jax.random.key(0)))
    added = peak_bytes() - before
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return {
        "added_bytes": added,
        "state_bytes": sum(leaf.nbytes for leaf in leaves),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state["params"] if engine == "opaque" else state.params)),
        "parts": [leaf.size // max(shard.data.size for shard in leaf.addressable_shards) for leaf in leaves if leaf.ndim],
    }


def peak_bytes():
    """Largest resident size so far; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_a_process(*args):
    """`measure` in a fresh interpreter."""
    code = f"import json, conftest, test_init_memory; print(json.dumps(test_init_memory.measure(*{args!r})))"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "laws")))}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's peak from /proc")


@needs_linux
@pytest.mark.parametrize(("engine", "width", "num_layers", "least"), [("opaque", 512, 12, 60e6), ("composed", 1024, 20, 300e6)])
def test_init_adds_little_more_than_the_state(engine, width, num_layers, least):
    """The larger one takes 4 GB and ten seconds."""
    found = in_a_process(engine, width, num_layers, 50304)
    assert least < found["num_params"] < 1.1 * least
    assert set(found["parts"]) == {8}
    assert found["state_bytes"] == pytest.approx(12 * found["num_params"], rel=1e-3)  # parameters and two moments in float32
    assert found["added_bytes"] < ALLOWED * found["state_bytes"], found


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_no_program_of_init_holds_a_whole_leaf(engine):
    """In the compiled program that makes the state, no instruction of any device has a sharded leaf's whole shape."""
    step, make_state = sharded_step(engine)
    sizes = {"width": 48, "num_layers": 3, "vocab": 4800}
    make = lambda key: make_state(make_params(key, **sizes))
    shapes = jax.eval_shape(make, jax.random.key(0))
    program = jax.jit(make, out_shardings=step.shardings(shapes), compiler_options=compiler.options(step.mesh))  # as init does
    text = program.lower(jax.random.key(0)).compile().as_text()
    for leaf in jax.tree.leaves(jax.eval_shape(lambda: make_params(jax.random.key(0), **sizes))):
        whole, piece = (",".join(map(str, shape)) for shape in (leaf.shape, step_shape(step, shapes, leaf.shape)))
        assert f"[{piece}]" in text
        assert f"[{whole}]" not in text, f"[{whole}] is whole somewhere"


def step_shape(step, state, shape):
    """The shape of one device's piece of the leaf of that shape."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(step.shardings(state)), strict=True)
    return next(sharding.shard_shape(shape) for leaf, sharding in pairs if leaf.shape == shape)
