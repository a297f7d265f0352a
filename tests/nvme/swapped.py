"""A small model whose moments rest in files, and how its states are trained and compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
