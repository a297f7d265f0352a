"""Tiles of a sequence: the same values and gradients with or without a mesh, less memory, and what cannot be tiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jzero

BATCH, LENGTH, WIDTH, VOCAB = 2, 16, 6, 32
FP32 = 1e-5  # relative L2: the same sums, in another order


def operands(length=LENGTH):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    tokens = jnp.asarray(random.integers(0, VOCAB, (BATCH, length)), jnp.int32)
    return {"up": draw(WIDTH, 24), "down": draw(24, WIDTH), "head": draw(WIDTH, VOCAB)}, draw(BATCH, length, WIDTH), tokens


def loss(params, x, tokens, tile=lambda fn: fn):
    """An MLP, then a sum and a weight, whose scalars are added up over tiles."""
    y = tile(lambda x: jnp.tanh(x @ params["up"]) @ params["down"])(x)

    def of_positions(y, tokens):
        logits = y @ params["head"]
        losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        valid = tokens > 5
        return jnp.sum(losses * valid), jnp.sum(valid).astype(jnp.float32), losses

    total, weight, losses = tile(of_positions)(y, tokens)
    return total / weight, losses


def run(tile):
    params, x, tokens = operands()
    call = jax.value_and_grad(lambda params, x: loss(params, x, tokens, tile), argnums=(0, 1), has_aux=True)
    return jax.jit(call)(params, x)


def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= FP32 * np.linalg.norm(other)


def test_tiles_change_nothing():
    assert_close(run(lambda fn: jzero.tiled(fn, 4)), run(lambda fn: fn))


@pytest.mark.parametrize("mesh", [{"data": 2, "sequence": 2}, pytest.param({"data": 1, "sequence": 4}, marks=pytest.mark.slow)])
def test_nor_on_a_split_sequence(mesh):
    """A step of SGD by stage 3, tiled and on a mesh, against plain on one device."""
    params, x, tokens = operands()
    in_tiles = lambda params, x, tokens: loss(params, jzero.split_sequence(x), tokens, lambda fn: jzero.tiled(fn, 2))[0]
    make = lambda fn: jzero.make_train_step(fn, optax.sgd(0.1), reduction="global")
    mesh = jzero.make_mesh(**mesh, devices=jax.devices()[:4])
    step, plain = jzero.shard(make(in_tiles), stage=3, mesh=mesh, min_shard_elements=1), make(lambda *args: loss(*args)[0])
    actual, _ = step(step.place(plain.init(params)), x, tokens)
    expected, _ = jax.jit(plain)(plain.init(params), x, tokens)
    assert_close(actual.params, expected.params)


@pytest.mark.parametrize("part", ["mlp", "loss"])
def test_memory_falls(part):
    """Of a hidden layer and of logits 16 times as wide as the input, an eighth is there at once."""
    length, wide = 4096, 512

    def temp_bytes(tile):
        def whole(x, w, v):
            if part == "mlp":
                return jnp.sum(tile(lambda x: jax.nn.relu(x @ w) @ v)(x) ** 2)
            return tile(lambda x: jnp.sum(jax.nn.logsumexp(x @ w, -1)))(x)

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, length, 32), (32, wide), (wide, 32))]
        return jax.jit(jax.grad(whole, argnums=(0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    plain, in_tiles = temp_bytes(lambda fn: fn), temp_bytes(lambda fn: jzero.tiled(fn, 8))
    assert plain >= 4 * length * wide
    assert in_tiles <= plain / 3, (plain, in_tiles)


BAD = {
    "tiles": (0, lambda x: x, (BATCH, LENGTH, 3), "num_tiles=0"),
    "indivisible": (5, lambda x: x, (BATCH, LENGTH, 3), "Numbers of tiles that divide: 1, 2, 4, 8, 16"),
    "rank": (2, lambda x: x, (BATCH,), r"agree on \[batch, length\]"),
    "result": (2, lambda x: x.sum(1), (BATCH, LENGTH, 3), "arrays of its positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained(name):
    num_tiles, fn, shape, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        jzero.tiled(fn, num_tiles)(jnp.ones(shape))
