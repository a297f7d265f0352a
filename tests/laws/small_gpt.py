"""A scanned GPT small enough to compile in a second, of dims that 3 and 8 divide."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import jzero

WIDTH, HEADS, LAYERS, LENGTH, VOCAB = 24, 3, 2, 8, 48
SHARPNESS = 3.0  # lifts the gradient's norm above one, or clipping to one would do nothing
ROWS = 96  # the batch axes times accumulate of every mesh divide it: 8 x 4, 3 x 4
TENSOR_RULES = (  # columns, then rows; vocabulary-parallel embedding and head
    (r"layers/up$", PartitionSpec(None, None, "tensor")),
    (r"layers/down$", PartitionSpec(None, "tensor", None)),
    (r"layers/qkv$", PartitionSpec(None, None, "tensor")),
    (r"embed$", PartitionSpec("tensor", None)),
)
# Beside a split sequence a lookup in a table of split rows ends XLA's partitioner (docs/log.md): there columns are split.
TENSOR_AND_SEQUENCE_RULES = (*TENSOR_RULES[:3], (r"embed$", PartitionSpec(None, "tensor")))
MIN_SHARD_ELEMENTS = 300  # embeddings and matrices shard, norms and biases do not


def drawing(seed):
    """A function of a shape: the next random matrix or stack of them."""
    random = np.random.default_rng(seed)
    return lambda *shape, scale=1.0: jnp.asarray(random.normal(0, scale / np.sqrt(shape[-2]), shape), jnp.float32)


def make_layers(draw, num_layers):
    return {
        "norms": jnp.ones((num_layers, 2, WIDTH)),
        "qkv": draw(num_layers, WIDTH, 3 * WIDTH),
        "qkv_bias": draw(num_layers, 1, 3 * WIDTH)[:, 0] / 10,  # a third of it, the key's, has a true gradient of zero
        "out": draw(num_layers, WIDTH, WIDTH),
        "up": draw(num_layers, WIDTH, 4 * WIDTH),
        "down": draw(num_layers, 4 * WIDTH, WIDTH),
    }


def make_params(*, tied, seed=1):
    draw = drawing(seed)
    layers = make_layers(draw, LAYERS)
    params = {
        "embed": draw(VOCAB, WIDTH, scale=np.sqrt(VOCAB)),
        "positions": draw(2 * LENGTH, WIDTH),  # twice as long as used: sliced on a dim
        "layers": layers,
    }
    return params if tied else {**params, "head": draw(WIDTH, VOCAB)}


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def _attention(x, p):
    q, k, v = jnp.split((x @ p["qkv"] + p["qkv_bias"]).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e4)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape) @ p["out"]


def _layer(x, p):
    x = x + _attention(_norm(x) * p["norms"][0], p)
    return x + jax.nn.relu(_norm(x) * p["norms"][1] @ p["up"]) @ p["down"], None


def token_losses(params, tokens):
    """float32[rows, LENGTH - 1]"""
    x = params["embed"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]
    x, _ = jax.lax.scan(_layer, x, params["layers"])
    head = params["head"] if "head" in params else params["embed"].T / math.sqrt(WIDTH)
    logits = SHARPNESS * (_norm(x) @ head).astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]


def _layer_of_pieces(kind, x, p):
    """The layer with four heads, on a sequence that a mesh axis may split."""
    y = _norm(x) * p["norms"][0]
    q, k, v = jnp.split((y @ p["qkv"] + p["qkv_bias"]).reshape(*x.shape[:2], 4, -1), 3, axis=-1)
    x = x + jzero.attention(q, k, v, kind=kind).reshape(x.shape) @ p["out"]
    x = x + jax.nn.relu(_norm(x) * p["norms"][1] @ p["up"]) @ p["down"]
    return jzero.split_sequence(x), None


def loss_of_pieces(kind, params, tokens, mask):
    """`weighted_loss` of all positions, the last with no weight, so LENGTH is split; masks leave pieces unequal weights."""
    x = jzero.split_sequence(params["embed"][tokens] + params["positions"][: tokens.shape[1]])
    x, _ = jax.lax.scan(functools.partial(_layer_of_pieces, kind), x, params["layers"])
    head = params["head"] if "head" in params else params["embed"].T / math.sqrt(WIDTH)
    logits = SHARPNESS * (_norm(x) @ head).astype(jnp.float32)
    targets, mask = jnp.roll(tokens, -1, axis=1), jnp.pad(mask, ((0, 0), (0, 1)))
    picked = jnp.sum(jnp.where(jnp.arange(VOCAB) == targets[..., None], logits, 0), -1)
    return jzero.weighted(jnp.sum(mask * (jax.nn.logsumexp(logits, -1) - picked)), jnp.sum(mask))


def mean_loss(params, tokens, mask):
    return jnp.mean(token_losses(params, tokens))


def weighted_loss(params, tokens, mask):
    return jzero.weighted(jnp.sum(mask * token_losses(params, tokens)), jnp.sum(mask))


def rules(mesh):
    """For a mesh by name."""
    of_tensor = TENSOR_AND_SEQUENCE_RULES if "sequence" in mesh else TENSOR_RULES
    return of_tensor if "tensor" in mesh else ()


LOSSES = {
    "mean": mean_loss,
    "weighted": weighted_loss,
    "ulysses": functools.partial(loss_of_pieces, "ulysses"),
    "ring": functools.partial(loss_of_pieces, "ring"),
}


def batch(seed=0):
    """Tokens, and masks that leave some rows nothing and others everything; shards and microbatches get unequal weights."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    lengths = random.integers(0, LENGTH, ROWS) * (np.arange(ROWS) % 3 > 0)
    return tokens, (np.arange(LENGTH - 1) < lengths[:, None]).astype(np.float32)
