"""A small GPT in every spelling that the traffic law asks for: scanned or unrolled, with and without remat, tied or not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

VOCAB, WIDTH, NUM_LAYERS, LENGTH = 2048, 256, 3, 128


class Spelling(NamedTuple):
    """How the same model is written."""

    scanned: bool
    remat: bool
    tied: bool


def make_params(how: Spelling) -> dict[str, Any]:
    """Abstract under `eval_shape`: fp32 leaves; biases are small enough to stay whole in the unrolled form."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    d = WIDTH

    def layer(*stack: int) -> dict[str, jax.Array]:
        return {
            "norm": zeros(*stack, d), "wqkv": zeros(*stack, d, 3 * d), "wo": zeros(*stack, d, d),
            "w1": zeros(*stack, d, 4 * d), "b1": zeros(*stack, 4 * d), "w2": zeros(*stack, 4 * d, d),
        }  # fmt: skip

    layers = layer(NUM_LAYERS) if how.scanned else [layer() for _ in range(NUM_LAYERS)]
    head = {} if how.tied else {"head": zeros(d, VOCAB)}
    return {"embed": zeros(VOCAB, d), "layers": layers, **head}


def make_loss(how: Spelling) -> Callable[[Any, jax.Array], jax.Array]:
    """Mean next-token cross-entropy of tokens[B, T + 1]; parameters are cast to bf16 where they are used."""

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
        q, k, v = jnp.moveaxis(((x * w["norm"]) @ w["wqkv"]).reshape(*x.shape[:2], 3, 4, -1), 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32)).astype(x.dtype)
        x = x + jnp.einsum("bhts,bshd->bthd", scores, v).reshape(x.shape) @ w["wo"]
        return x + jax.nn.gelu((x * w["norm"]) @ w["w1"] + w["b1"]) @ w["w2"], None

    body = jax.checkpoint(layer) if how.remat else layer

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"].astype(jnp.bfloat16)[tokens[:, :-1]]
        if how.scanned:
            x, _ = jax.lax.scan(body, x, params["layers"])
        else:
            for w in params["layers"]:
                x, _ = body(x, w)
        head = params["embed"].T if how.tied else params["head"]
        logits = (x @ head.astype(jnp.bfloat16)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def opaque_step(how: Spelling, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The step as a user writes it without jzero."""
    loss_fn = make_loss(how)

    def train_step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return train_step
