"""Portability law in full: twelve layouts of stage, devices, replicas and precision; saved in each, restored in each.

What is restored is what was saved, bit by bit after the documented cast. It trains on as the same values placed on that mesh
do, bit by bit; as the uninterrupted run does, bit by bit where the layout is the same; and on another within DESIGN 6's parity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from closeness import LOW_PRECISION
from test_parity_composed import FP32

import jzero

# stage, replica, data, precision
LAYOUTS = [
    (0, 1, 1, "fp32"), (0, 1, 4, "bf16"), (1, 1, 2, "fp32"), (1, 1, 8, "fp16"),
    (1, 2, 4, "bf16-pure"), (2, 1, 3, "fp32"), (2, 2, 2, "bf16"), (2, 1, 8, "fp32"),
    (3, 1, 8, "fp32"), (3, 1, 3, "bf16"), (3, 2, 4, "fp16"), (3, 1, 4, "bf16-pure"),
]  # fmt: skip
NUM_BEFORE, NUM_AFTER = 2, 3


def label(layout):
    stage, replica, data, precision = layout
    return f"stage{stage}-{replica}x{data}-{precision}"


@functools.cache
def make(layout):
    """A step of each layout and how to make its state; compiled once."""
    stage, replica, data, precision = layout
    train_step, make_state = tiny.make("composed", precision=precision)
    mesh = jzero.make_mesh(replica=replica, data=data, devices=jax.devices()[: replica * data])
    return jzero.shard(train_step, stage=stage, mesh=mesh, min_shard_elements=64), make_state


def train(step, state, first, num_steps):
    losses = []
    for i in range(first, first + num_steps):
        state, metrics = step(state, tiny.batch() + np.float32(0.01 * i))
        assert not metrics["skipped"], "a skipped step would compare nothing"
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Of each layout its checkpoint, the values in it, and the losses of the run that went on. Each is written once."""

    @functools.cache
    def of(layout):
        step, make_state = make(layout)
        state, _ = train(step, step.place(make_state(tiny.make_params())), 0, NUM_BEFORE)
        path = tmp_path_factory.mktemp("layout") / "run"
        manager = jzero.CheckpointManager(path, step=step)
        manager.save(NUM_BEFORE, state)
        manager.close()
        values = jax.tree.map(on_one, state)
        return path, values, train(step, state, NUM_BEFORE, NUM_AFTER)[1]

    return of


def on_one(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(np.asarray(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return np.array(leaf)


def documented_cast(values, source, target):
    """As docs/checkpoints.md says of a change of precision: floats are converted, the loss scale begins anew."""
    _, make_state = make(target)
    like = jax.eval_shape(make_state, tiny.make_params())
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    cast = jax.tree.map(lambda leaf, to: leaf if is_key(leaf) else np.asarray(leaf).astype(to.dtype), values, like)
    if (source[3] == "fp16") == (target[3] == "fp16"):
        return cast
    scale = np.float32(2.0**15 if target[3] == "fp16" else 1.0)
    fresh = values.loss_scale._replace(scale=scale, clean_steps=np.int32(0), credit=np.int32(2))
    return cast._replace(loss_scale=fresh)


def as_bytes(state):
    keys = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [(leaf.dtype, np.asarray(keys(leaf)).tobytes()) for leaf in jax.tree.leaves(state)]


def check(saved, source, target):
    path, values, uninterrupted = saved(source)
    step, _ = make(target)
    step.known = None  # as in a fresh process
    expected = documented_cast(values, source, target)
    step.shardings(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, expected)))
    restored, _ = jzero.CheckpointManager(path).restore(step, cast=source[3] != target[3])
    assert as_bytes(restored) == as_bytes(expected)
    assert restored.params["up"].sharding.mesh.shape == step.mesh.shape
    _, losses = train(step, restored, NUM_BEFORE, NUM_AFTER)
    assert losses == train(step, step.place(expected), NUM_BEFORE, NUM_AFTER)[1]  # the same mesh, so bitwise
    if source == target:
        assert losses == uninterrupted
    if source[3] == target[3] == "fp32":
        assert losses == pytest.approx(uninterrupted, rel=FP32)
    _, alone = train(*on_one_device(target[3], expected), NUM_BEFORE, NUM_AFTER)
    if target[3] == "fp32":
        assert losses == pytest.approx(alone, rel=FP32)
        return
    in_fp32 = documented_cast(expected, target, (0, 1, 1, "fp32"))
    _, exact = train(*on_one_device("fp32", in_fp32), NUM_BEFORE, NUM_AFTER)
    found, allowed = (np.linalg.norm(np.subtract(one, exact)) for one in (losses, alone))
    assert found <= LOW_PRECISION * allowed, f"losses {found:.3e} from float32's, unsharded {allowed:.3e}"


def on_one_device(precision, values):
    step, _ = make((0, 1, 1, precision))
    return step, step.place(values)


PAIRS = [(source, target) for source in LAYOUTS for target in LAYOUTS]
# A ring through every stage and precision, and one that stays where it is: each compiles its layout, which is what costs.
RING = [LAYOUTS[i] for i in (8, 1, 5, 10, 4, 6, 11)]
SAMPLE = [*zip(RING, RING[1:] + RING[:1], strict=True), (LAYOUTS[10], LAYOUTS[10])]
names = lambda pairs: ["-to-".join(map(label, pair)) for pair in pairs]


@pytest.mark.parametrize(("source", "target"), SAMPLE, ids=names(SAMPLE))
def test_saved_in_one_layout_and_restored_in_another(saved, source, target):
    check(saved, source, target)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=names(PAIRS))
def test_every_layout_restores_into_every_layout(saved, source, target):
    check(saved, source, target)
