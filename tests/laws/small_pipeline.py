"""The small GPT cut into embedding, layers and head: tied or not, mean or weighted, layers stacked or listed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import small_gpt
from small_gpt import LENGTH, SHARPNESS, VOCAB, WIDTH

import jzero

MIN_SHARD_ELEMENTS = 300


def make_params(*, num_layers, tied, listed=False, seed=1):
    draw = small_gpt.drawing(seed)
    layers = small_gpt.make_layers(draw, num_layers)
    table = {"table": draw(VOCAB, WIDTH, scale=np.sqrt(VOCAB))}
    if listed:
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(num_layers)]
    embed = {"positions": draw(2 * LENGTH, WIDTH)}
    if tied:
        return {"embed": embed, "layers": layers, "head": {"scale": jnp.ones(WIDTH)}, "tied": table}
    return {"embed": {**embed, **table}, "layers": layers, "head": {"scale": jnp.ones(WIDTH), "out": draw(WIDTH, VOCAB)}}


def embed(params, tokens, mask):
    return params["table"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]


def layer(params, x):
    return small_gpt._layer(x, params)[0]


def token_losses(params, x, tokens):
    out = params["out"] if "out" in params else params["table"].T / math.sqrt(WIDTH)
    logits = SHARPNESS * (small_gpt._norm(x) * params["scale"] @ out).astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]


def mean_loss(params, x, tokens, mask):
    return jnp.mean(token_losses(params, x, tokens))


def weighted_loss(params, x, tokens, mask):
    return jzero.weighted(jnp.sum(mask * token_losses(params, x, tokens)), jnp.sum(mask))


LOSSES = {"mean": mean_loss, "weighted": weighted_loss}


@functools.cache
def model(loss, split=None):
    return jzero.Pipeline(embed, layer, LOSSES[loss], split=split)
