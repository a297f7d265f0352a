"""Fused AdamW and Lion: optax's numbers, any moments, buckets of small leaves, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero
import pallas_kernels
from jzero.optim import fused_adamw, fused_lion, moments_8bit
from pallas_kernels import fused_optimizer
from pallas_kernels.fused_optimizer import buckets

RANDOM = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for name, shape in {"w": (64, 96), "b": (96,), "s": ()}.items()
}
MASK = {"w": True, "b": False, "s": False}
RATE = optax.linear_schedule(1e-2, 1e-3, 5)
PAIRS = {
    "adamw": (fused_adamw(1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)),
    "adamw, schedule and mask": tuple(make(RATE, 0.8, 0.95, 1e-6, 1e-9, mask=MASK) for make in (fused_adamw, optax.adamw)),
    "lion": (fused_lion(1e-3), optax.lion(1e-3)),
    "8 bits": (fused_adamw(1e-2, moments="8bit", min_elements=64), moments_8bit(optax.adamw(1e-2), min_elements=64)),
    "injected": (
        optax.inject_hyperparams(fused_adamw)(learning_rate=1e-2, b1=0.8),
        optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, b1=0.8),
    ),
}  # fmt: skip


def gradients(step):
    return jax.tree.map(lambda leaf: jnp.sin(leaf * (step + 3)) * 0.1, PARAMS)


def run(tx, num_steps=4, **extra):
    """Parameters after some updates, and the state."""
    tx, params = optax.with_extra_args_support(tx), PARAMS
    state, update = tx.init(params), jax.jit(lambda *args: tx.update(*args, **extra))
    for step in range(num_steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", [*list(PAIRS)[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in list(PAIRS)[3:])])
def test_equals_optax(name):
    """The same operations in the same order, in one program or in several: a few units in float32's last place."""
    (found, _), (wanted, _) = map(run, PAIRS[name])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_factor_unscales_and_clips():
    """4 x g with a factor of a quarter is g."""
    tx = fused_adamw(1e-2)
    larger = jax.tree.map(lambda g: g * 4, gradients(0))
    given = ((gradients(0), 1.0), (larger, 0.25))
    updates = [tx.update(grads, tx.init(PARAMS), PARAMS, factor=factor)[0] for grads, factor in given]
    for one, other in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_array_equal(one, other)


def test_moments_in_16_bits_keep_their_mean():
    """A second moment that grows by a thousandth of itself a step: to nearest, bfloat16 would lose every step."""
    params = {"w": jnp.ones(4096)}
    tx = fused_adamw(1e-3, moments="bfloat16")
    state = jax.lax.fori_loop(0, 200, lambda _, state: tx.update(params, state, params)[1], tx.init(params))
    assert state.nu["w"].dtype == jnp.bfloat16
    assert float(state.nu["w"].astype(jnp.float32).mean()) == pytest.approx(1 - 0.999**200, rel=2e-3)


def test_a_copy_in_16_bits_has_the_parameters_mean():
    w = jnp.full((64, 256), 1.001, jnp.float32)
    leaf = fused_optimizer.Leaf(w, 0 * w, (0 * w, 0 * w))
    (one,) = fused_optimizer.adamw([leaf], rate=0.0, count=1, returns="params", copy=jnp.bfloat16)
    np.testing.assert_array_equal(one.value, w)
    assert set(np.unique(one.copy.astype(jnp.float32))) == {1.0, 1.0078125}
    assert float(one.copy.astype(jnp.float32).mean()) == pytest.approx(1.001, abs=5 * 0.0026 / 128)


@pytest.mark.parametrize("shapes", [[(3,), (7, 5), (), (300, 4)], [(1024,)], [(1000,)]])
def test_a_bucket_gives_each_leaf_its_own(shapes):
    """Whatever a kernel is given side by side, apart again; the update stands in for it."""
    leaves = []
    for shape in shapes:
        draw = jnp.asarray(RANDOM.normal(size=shape), jnp.float32)
        leaves.append(fused_optimizer.Leaf(draw, draw + 1, (draw + 2,)))
    calls = []

    def update(leaf, index):
        calls.append(leaf.param.shape)
        return leaf.param * 2, leaf.grad + leaf.moments[0]

    found = buckets.run(leaves, update, lambda leaf: True, buckets.BELOW)
    assert calls == [(1024,)] if shapes == [(1024,)] else len(calls) == 1 and calls[0][1] == buckets.WIDTH
    for (doubled, total), leaf in zip(found, leaves, strict=True):
        np.testing.assert_array_equal(doubled, leaf.param * 2)
        np.testing.assert_array_equal(total, leaf.grad + leaf.moments[0])
    buckets.run(leaves, update, lambda leaf: True, 0)
    assert calls[1:] == shapes


def test_what_is_split_takes_no_kernel_and_no_bucket(monkeypatch):
    """A kernel that has run on its device is taken on one device; where arrays may be split it would gather them."""
    ran = frozenset({("fused_adamw", "mosaic_gpu", "NVIDIA H100 80GB HBM3")})
    monkeypatch.setattr(pallas_kernels.dispatch, "_ran", lambda: ran)
    leaf = jnp.ones((64, 128))
    with pallas_kernels.target("NVIDIA H100 80GB HBM3"), pallas_kernels.recording() as choices:
        jax.eval_shape(lambda w: fused_optimizer.adamw([fused_optimizer.Leaf(w, w, (w, w))], rate=0.1, count=1), leaf)
    assert choices[0].implementation == "reference"
    assert "not mosaic_gpu: its arrays may be split over devices" in choices[0].reason


@pytest.mark.slow
def test_reports_list_the_update():
    train_step = jzero.make_train_step(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"] + p["b"]) ** 2 * p["s"]), fused_adamw(1e-2))
    report = jzero.shard(train_step, stage=3).report(jax.eval_shape(train_step.init, PARAMS), np.ones((8, 64), np.float32))
    assert report.engine == "composed"
    assert {(row["op"], row["implementation"]) for row in report.kernels} == {("fused_adamw", "reference")}
    assert sum(row["calls"] for row in report.kernels) == 3


W = jnp.ones((4, 4))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    {
        "moments": (lambda: fused_adamw(1e-3, moments="int8"), ValueError, r"no such moments\n.*\n.*Known: float32"),
        "no effect": (lambda: fused_lion(1e-3, min_elements=8), ValueError, "without effect"),
        "no params": (lambda: (tx := fused_lion(1e-3)).update(PARAMS, tx.init(PARAMS)), ValueError, "params=None"),
        "mask": (lambda: (tx := fused_lion(1, mask=[1])).update(PARAMS, tx.init(PARAMS), PARAMS), ValueError, "mask= is not"),
        "shapes": (
            lambda: fused_optimizer.lion([fused_optimizer.Leaf(W, W[0], (W,))], rate=1, count=1), ValueError,
            r"leaf 0: param float32\[4,4\], grad float32\[4\]",
        ),
        "scales": (
            lambda: fused_optimizer.lion([fused_optimizer.Leaf(W, W, (W.astype(jnp.uint8),))], rate=1, count=1), ValueError,
            "with 0 scales",
        ),
        "returns": (lambda: fused_optimizer.lion([], rate=1, count=1, returns="deltas"), ValueError, "returns='deltas'"),
        "kernel": (
            lambda: fused_optimizer.lion([fused_optimizer.Leaf(W, W, (W,))], rate=1, count=1, implementation="mosaic_tpu"),
            NotImplementedError, "runs on a TPU",
        ),
    }.values(),
)  # fmt: skip
def test_what_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
