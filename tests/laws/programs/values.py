"""Losses that use parameters as values: their norms, orders, factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from programs.table import BIAS, SQUARE, D, H, V, W, loss, mlp


@loss(w=W, b=BIAS)
def l2_penalty(p, x, t):
    return jnp.mean((x + p["b"]) @ p["w"]) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


@loss(w=W, v=V)
def global_norm(p, x, t):
    return jnp.mean(mlp(p, x)) + 0.1 * optax.tree.norm(p) + 0.1 * jnp.max(jnp.abs(p["w"]))


@loss(w=W)
def weight_normalisation(p, x, t):
    return jnp.mean(jnp.sin(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))))


@loss(w=W, other=W, gate=BIAS)
def where_between_parameters(p, x, t):
    chosen = jnp.where(p["w"] > p["other"], p["w"], 2 * p["other"])
    return jnp.mean(x @ jnp.where(p["gate"][:, None] > 0, chosen, jnp.maximum(p["w"], p["other"])))


@loss(w=W, b=BIAS)
def sorted_parameters(p, x, t):
    return jnp.mean(x @ (jnp.sort(p["w"], axis=1) + jnp.cumsum(p["w"], axis=0))) + jnp.cumprod(1 + 0.1 * p["b"]).sum()


@loss(square=SQUARE)
def factorisations(p, x, t):
    lower = jnp.linalg.cholesky(p["square"] @ p["square"].T + 2 * jnp.eye(D))
    q, r = jnp.linalg.qr(p["square"])
    return jnp.mean(x @ lower @ q) + jnp.mean(jnp.sin(r))


@loss(meets=True, local=True, square=SQUARE, b=BIAS)
def linear_systems(p, x, t):
    """The analysis does not follow the gradient through `linear_solve`."""
    matrix = p["square"] @ p["square"].T + 2 * jnp.eye(D)
    return jnp.mean(x @ jnp.linalg.inv(matrix)) + jnp.linalg.slogdet(matrix)[1] + jnp.linalg.solve(matrix, p["b"]).sum()


@loss(w=W, v=V)
def complex_numbers(p, x, t):
    spectrum = jnp.fft.rfft(x @ p["w"], axis=-1) * lax.complex(jnp.cos(p["v"][0, 0]), p["v"][0, 1])
    return jnp.mean(jnp.abs(spectrum)) + jnp.mean(jnp.real(jnp.fft.fft(p["v"], axis=0)) ** 2)


@loss(w=W)
def outer_powers(p, x, t):
    return jnp.mean(x @ p["w"] @ p["w"].T @ p["w"]) + jnp.sum(jnp.einsum("ij,ij->i", p["w"], p["w"]) ** 2)


@loss(a=W, b=V)
def two_parameters_contracted(p, x, t):
    return jnp.mean(x @ jnp.einsum("ij,jk,kl->il", p["a"], p["b"], p["a"])) + jnp.mean((p["a"] @ p["b"]) ** 2)


@loss(w=W, index=lambda rng: jnp.asarray(rng.permutation(H), jnp.int32), key=lambda rng: jax.random.key(3), opaque=False)
def integer_and_key_leaves(p, x, t):
    noise = jax.random.normal(p["key"], (H,))
    return jnp.mean((x @ p["w"][:, p["index"]]) * (1 + 0.1 * noise))


@loss(w=W, scale=lambda rng: jnp.asarray(2.0), power=lambda rng: 3.0)
def weak_types_and_literals(p, x, t):
    return 2 * jnp.mean((x @ p["w"] * p["scale"]) ** 2) / 3 + 0.01 * p["power"] * p["scale"]


@loss(w=W, activation=lambda rng: jnp.tanh, opaque=False)
def callable_leaf(p, x, t):
    return jnp.mean(p["activation"](x @ p["w"]))


@loss(w=W, v=V, frozen=W, trains=lambda path: path != "frozen", opaque=False)
def frozen_leaf(p, x, t):
    return jnp.mean((mlp(p, x) + jnp.sin(x @ p["frozen"]) @ p["v"]) ** 2)


CLOSED_OVER = np.random.default_rng(2).normal(size=(H, D)).astype(np.float32)


@loss(w=W)
def closed_over_arrays(p, x, t):
    return jnp.mean(jnp.tanh(x @ p["w"]) @ CLOSED_OVER @ jnp.asarray(CLOSED_OVER.T))


@loss(w=W, v=V)
def parameter_returned_whole(p, x, t):
    keep = jax.jit(lambda w, x: (w, x @ w))
    w, h = keep(p["w"], x)
    return jnp.mean(h) + jnp.mean(jnp.sin(w)) + jnp.mean(mlp(p, x))


@loss(w=W, v=V)
def barrier(p, x, t):
    w, v, x = lax.optimization_barrier((p["w"], p["v"], x))
    (w,) = lax.optimization_barrier((w,))
    return jnp.mean(mlp({"w": w, "v": v}, x) ** 2)


@loss(w=W, v=V)
def rounded_to_integers(p, x, t):
    return jnp.mean((x @ p["w"]) * (p["w"] * 10).astype(jnp.int32)[0]) + jnp.mean(p["v"] * p["v"].astype(bool))


@loss(w=W, v=V, exact=lambda p, x, t: jnp.mean(mlp(p, x) ** 2))
def bfloat16_inside(p, x, t):
    p, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (p, x))
    return jnp.mean(mlp(p, x).astype(jnp.float32) ** 2)
