"""A small model whose moments rest in files, and how its states are trained and compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero
from jzero.offload.nvme.array import DiskArray

WIDTH = 64


def loss(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - 1) ** 2)


def make_params(num=4):
    keys = jax.random.split(jax.random.key(1), num)
    return {f"w{i}": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for i, key in enumerate(keys)}


def batch(i=0):
    return np.random.default_rng((3, i)).normal(size=(8, WIDTH)).astype(np.float32)


def make_step(where, *, tx=None, stage=3, bucket_bytes=4096, mesh=None, **options):
    """A bucket of two moments each."""
    train_step = jzero.make_train_step(loss, tx or optax.adamw(1e-2), **options)
    offload = None if where is None else jzero.Offload(opt_state=f"nvme:{where}", bucket_bytes=bucket_bytes)
    return jzero.shard(train_step, stage=stage, min_shard_elements=64, offload=offload, mesh=mesh)


def make_state(step):
    return step.place(step.fn.init(make_params()))


def train(step, state, num=3, first=0):
    for i in range(first, first + num):
        state, metrics = step(state, batch(i))
    return state, float(metrics["loss"])


def numbers(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state, state.step))]


def assert_same(left, right):
    for one, other in zip(numbers(left), numbers(right), strict=True):
        np.testing.assert_array_equal(one, other)


def files(state):
    return sorted({path for leaf in jax.tree.leaves(state.opt_state) if isinstance(leaf, DiskArray) for path in leaf.files})


def shard_file(leaf, number=0):
    return leaf.swap.files[leaf.index][number]


def by_rows(offload, *, precision="fp32"):
    """Stacked layers, 3 MiB an array: four steps with numbers as on the device; `report.offload`, and the state."""

    def stacked_loss(params, x):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((out @ params["head"]) ** 2)

    params = {"layers": jax.random.normal(jax.random.key(0), (12, 256, 256)) / 16, "head": jnp.ones((256, 8))}
    mesh = jzero.make_mesh(devices=jax.devices()[:1])
    x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)

    def run(offload, num):
        train_step = jzero.make_train_step(stacked_loss, optax.adamw(1e-3), precision=precision, accumulate=2, clip_norm=0.1)
        step = jzero.shard(train_step, stage=3, mesh=mesh, offload=offload)
        state = step.place(train_step.init(params))
        for _ in range(num):
            state, metrics = step(state, x)
        return step, state, float(metrics["loss"])

    _, expected, _ = run(None, 1)
    step, state, _ = run(offload, 1)
    for one, other in zip(numbers(state), numbers(expected), strict=True):
        assert np.max(np.abs(one - other)) <= 2 * np.spacing(np.float32(np.max(np.abs(other))))  # as the law of parity
    for _ in range(3):
        state, metrics = step(state, x)
    assert float(metrics["loss"]) == pytest.approx(run(None, 4)[2], rel=1e-4)
    return step.report(state, x).offload, state
