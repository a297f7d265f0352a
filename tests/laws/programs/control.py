"""Losses with control flow."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from programs.table import BIAS, SQUARE, STACK, D, H, L, V, W, loss, mlp


@loss(w=W, v=V, gate=BIAS)
def cond(p, x, t):
    h = lax.cond(p["gate"][0] > 0, lambda x, w: x @ w, lambda x, w: jnp.sin(x @ w), x, p["w"])
    return jnp.mean(lax.cond(p["gate"].sum() > 0, lambda: jnp.tanh(h) @ p["v"], lambda: h @ p["v"]) ** 2)


@loss(w=W, v=V, gate=BIAS)
def switch(p, x, t):
    index = jnp.argmax(p["gate"]) % 3
    h = lax.switch(index, [lambda w: jnp.sin(x @ w), lambda w: x @ w, lambda w: jnp.cos(x @ w)], p["w"])
    return jnp.mean((h @ p["v"]) ** 2)


@loss(layers=STACK, gate=(L, 8))
def cond_in_scan(p, x, t):
    def layer(h, leaves):
        w, gate = leaves
        return lax.cond(gate[0] > 0, lambda: jnp.tanh(h @ w), lambda: h + jnp.sin(h @ w)), None

    return jnp.mean(lax.scan(layer, x, (p["layers"], p["gate"]))[0] ** 2)


@loss(square=SQUARE, w=W)
def while_forward_only(p, x, t):
    """The largest singular value by power iteration, as spectral normalisation uses it: no gradient through the loop."""
    frozen = lax.stop_gradient(p["square"])
    start = (0, jnp.full(D, D**-0.5))
    normalised = optax.projections.projection_l2_sphere
    _, u = lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, normalised(frozen @ c[1])), start)
    return jnp.mean(jnp.tanh(x @ p["square"] / (u @ p["square"] @ u)) @ p["w"])


@loss(w=SQUARE)
def fori_loop(p, x, t):
    return jnp.mean(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]) * (1 + i), x) ** 2)


@loss(layers=STACK)
def fori_loop_over_layers(p, x, t):
    return jnp.mean(lax.fori_loop(0, L, lambda i, h: h + jnp.tanh(h @ p["layers"][i]), x) ** 2)


@loss(w=SQUARE, v=SQUARE)
def parameters_in_the_carry(p, x, t):
    def body(carry, _):
        h, w, v = carry
        return (jnp.tanh(h @ w), w, v * 0.9), jnp.mean(h)

    (h, w, v), means = lax.scan(body, (x, p["w"], p["v"]), length=3)
    return jnp.mean(h @ w @ v) + means.sum()


@loss(w=SQUARE, v=SQUARE)
def parameters_swapped_in_the_carry(p, x, t):
    def body(carry, _):
        h, w, v, u = carry
        return (jnp.tanh(h @ w), v, w, u.T), None

    return jnp.mean(lax.scan(body, (x, p["w"], p["v"], p["w"]), length=3)[0][0] ** 2)


@loss(layers=STACK)
def layers_stacked_again(p, x, t):
    def body(h, w):
        return jnp.tanh(h @ w), w

    h, stacked = lax.scan(body, x, p["layers"])
    return jnp.mean(h) + jnp.mean(stacked**2)


@loss(layers=(2 * L, D, D))
def reversed_and_unrolled_scan(p, x, t):
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"], reverse=True, unroll=2)
    return jnp.mean(lax.scan(lambda h, w: (h @ w, None), h, p["layers"][:3], unroll=True)[0])


@loss(layers=(2, L, D, D), shared=SQUARE)
def nested_scans(p, x, t):
    def outer(h, group):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w) @ p["shared"], None), h, group)[0], None

    return jnp.mean(lax.scan(outer, x, p["layers"])[0] ** 2)


@loss(layers=STACK)
def scanned_leaf_also_outside(p, x, t):
    h, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])
    return jnp.mean(h @ p["layers"][1]) + 0.1 * jnp.sum(p["layers"] ** 2)


@loss(layers=(D, H))
def scan_over_the_split_dim(p, x, t):
    return jnp.mean(lax.scan(lambda h, row: (jnp.tanh(h + row[:D] * row[D:]), row.sum()), x, p["layers"].T.reshape(D, H))[0])


@loss(w=SQUARE, v=SQUARE)
def same_layer_twice(p, x, t):
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    return jnp.mean(layer(layer(x, p["w"]), p["w"]) @ p["v"]) + jnp.mean(layer(x, p["v"]))


@loss(shared=SQUARE, layers=STACK)
def shared_weights_in_scan(p, x, t):
    def layer(h, w):
        return jnp.tanh(h @ w @ p["shared"]) + h @ p["shared"].T, None

    return jnp.mean(lax.scan(jax.checkpoint(layer), x, p["layers"])[0] ** 2)


@loss(w=W, v=V)
def nested_jit(p, x, t):
    inner = jax.jit(lambda w, x: jax.jit(jnp.tanh)(x @ w))
    return jnp.mean(jax.jit(lambda p, x: inner(p["w"], x) @ p["v"])(p, x) ** 2)


@loss(w=W, v=V)
def vmapped_examples(p, x, t):
    return jax.vmap(lambda x, t: jnp.sum(mlp(p, x) ** 2) * jnp.sin(t[0]))(x, t).mean()


@loss(experts=(4, D, D))
def vmapped_parameters(p, x, t):
    return jnp.mean(jax.vmap(lambda w: jnp.tanh(x @ w))(p["experts"]).sum(0) ** 2)


@loss(layers=STACK)
def associative_scan(p, x, t):
    return jnp.mean(x @ lax.associative_scan(jnp.matmul, p["layers"])[-1])
