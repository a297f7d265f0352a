"""Losses with derivatives of the user's own."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from programs.table import STACK, V, W, loss, mlp


@loss(w=W, v=V)
def optax_loss(p, x, t):
    return optax.softmax_cross_entropy_with_integer_labels(x @ p["w"], t[:, 0]).mean() + optax.huber_loss(mlp(p, x), x).mean()


@loss(w=W, v=V)
def relu_of_parameters(p, x, t):
    return jnp.mean((jax.nn.relu(x @ jax.nn.relu(p["w"])) @ jax.nn.silu(p["v"])) ** 2)


@jax.custom_jvp
def halved(w):
    return w * 1.0


halved.defjvp(lambda primals, tangents: (primals[0], tangents[0] / 2))  # not the true derivative: it must be the one used


@loss(w=W)
def own_custom_jvp(p, x, t):
    return jnp.mean(jnp.tanh(x @ halved(p["w"])))


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def scaled_matmul(activation, x, w, scale):
    return activation(x @ w)


def _scaled_matmul_backward(activation, scale, residuals, cotangent):
    x, w = residuals
    (inner,) = jax.vjp(activation, x @ w)[1](cotangent)
    return inner @ w.T, scale * x.T @ inner


scaled_matmul.defvjp(lambda activation, x, w, scale: (activation(x @ w), (x, w)), _scaled_matmul_backward)


@loss(w=W, v=V)
def own_custom_vjp(p, x, t):
    return jnp.mean(scaled_matmul(jnp.sin, scaled_matmul(jnp.tanh, x, p["w"], 0.5), p["v"], 3.0))


@loss(layers=STACK)
def own_custom_vjp_in_scan(p, x, t):
    return jnp.mean(lax.scan(lambda h, w: (scaled_matmul(jnp.tanh, h, w, 0.5), None), x, p["layers"])[0])


@jax.custom_vjp
def rounded(w):
    return jnp.round(w * 8) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, cotangent: (cotangent,))


@loss(w=W)
def straight_through(p, x, t):
    return jnp.mean((x @ rounded(p["w"])) ** 2)


@loss(w=W, v=V)
def frozen_by_stop_gradient(p, x, t):
    return jnp.mean((jnp.tanh(x @ lax.stop_gradient(p["w"])) @ p["v"]) ** 2) + jnp.mean(x @ p["w"])


@loss(w=W)
def gradient_penalty(p, x, t):
    slope = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)
    return jnp.mean((jnp.linalg.norm(slope, axis=-1) - 1) ** 2)


@loss(w=W, v=V)
def gradient_of_remat(p, x, t):
    slope = jax.grad(lambda x: jnp.sum(jax.checkpoint(mlp)(p, x)))(x)
    return jnp.mean((slope - x) ** 2)


@loss(w=W, v=V)
def inner_gradient_of_parameters(p, x, t):
    """One step of the inner loop of MAML."""
    inner = jax.grad(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2))
    return jnp.mean(jax.vmap(lambda x: jnp.tanh(x @ (p["w"] - 0.1 * inner(p["w"], x))) @ p["v"])(x) ** 2)


@loss(w=W)
def directional_derivative(p, x, t):
    return jnp.mean(jax.jvp(lambda x: jnp.sin(x @ p["w"]), (x,), (x,))[1] ** 2)
