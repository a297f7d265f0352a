"""The small GPT with a mixture of experts in place of its MLP: 8 experts, of which each token takes two."""

import jax
import jax.numpy as jnp
import numpy as np
import small_gpt
from jax.sharding import PartitionSpec
from small_gpt import HEADS as HEADS
from small_gpt import LAYERS, LENGTH, MIN_SHARD_ELEMENTS, ROWS, SHARPNESS, VOCAB, WIDTH
from small_gpt import batch as batch

import jzero
from jzero import moe

NUM_EXPERTS, TOP_K, HIDDEN = 8, 2, 12
CAPACITY_FACTOR = 1.0  # drops about a fifth of the choices: sequences are short
BALANCE_WEIGHT, Z_WEIGHT = 0.1, 0.01  # large, or an error in the routers' losses would drown in the tokens'
EXPERT_RULES = ((r"layers/(gate|up|down)$", PartitionSpec(None, "expert")),)
TENSOR_RULES = (
    (r"layers/(gate|up)$", PartitionSpec(None, "expert", None, "tensor")),
    (r"layers/down$", PartitionSpec(None, "expert", "tensor")),
    *[rule for rule in small_gpt.TENSOR_RULES if not rule[0].startswith(("layers/up", "layers/down"))],
)


def make_params(*, tied, seed=1):
    params, draw = small_gpt.make_params(tied=tied, seed=seed), small_gpt.drawing(seed + 1)
    kept = {name: params["layers"][name] for name in ("norms", "qkv", "qkv_bias", "out")}
    experts = {
        "router": draw(LAYERS, WIDTH, NUM_EXPERTS, scale=2.0),
        "gate": draw(LAYERS, NUM_EXPERTS, WIDTH, HIDDEN),
        "up": draw(LAYERS, NUM_EXPERTS, WIDTH, HIDDEN),
        "down": draw(LAYERS, NUM_EXPERTS, HIDDEN, WIDTH),
    }
    return {**params, "layers": {**kept, **experts}}


def make_layer(capacity_factor):
    def layer(carry, p):
        x, losses = carry
        x = x + small_gpt._attention(small_gpt._norm(x) * p["norms"][0], p)
        y = small_gpt._norm(x) * p["norms"][1]
        routing = moe.route(y, p["router"], top_k=TOP_K)
        out = moe.swiglu(y, routing, p["gate"], p["up"], p["down"], capacity_factor=capacity_factor)
        return (x + out, losses + BALANCE_WEIGHT * routing.balance + Z_WEIGHT * routing.z), None

    return layer


def token_losses(params, tokens, capacity_factor=None):
    """float32[rows, LENGTH - 1], and the routers' losses."""
    x = params["embed"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]
    (x, losses), _ = jax.lax.scan(make_layer(capacity_factor), (x, jnp.zeros((), jnp.float32)), params["layers"])
    head = params["head"] if "head" in params else params["embed"].T / np.sqrt(WIDTH)
    logits = SHARPNESS * (small_gpt._norm(x) @ head).astype(jnp.float32)
    found = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return found, losses


def mean_loss(params, tokens, mask):
    losses, routers = token_losses(params, tokens)
    return jnp.mean(losses) + routers


def capacity_loss(params, tokens, mask):
    losses, routers = token_losses(params, tokens, CAPACITY_FACTOR)
    return jnp.mean(losses) + routers


def weighted_loss(params, tokens, mask):
    losses, routers = token_losses(params, tokens)
    weight = jnp.sum(mask)
    return jzero.weighted(jnp.sum(mask * losses) + weight * routers, weight)


LOSSES = {"mean": mean_loss, "capacity": capacity_loss, "weighted": weighted_loss}
__all__ = ["LENGTH", "LOSSES", "MIN_SHARD_ELEMENTS", "ROWS", "VOCAB", "batch", "make_params"]


def rules(mesh):
    """For a mesh by name."""
    return TENSOR_RULES if "tensor" in mesh else EXPERT_RULES if "expert" in mesh else ()
