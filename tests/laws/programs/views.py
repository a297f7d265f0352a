"""Losses that use parameters through views: slices, reshapes, lookups."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from programs.table import BIAS, EMBED, SQUARE, STACK, D, H, T, V, W, loss


@loss(wte=EMBED, wpe=EMBED)
def slice_along_the_split_dim(p, x, t):
    return jnp.mean(jnp.sin(p["wte"][t] + p["wpe"][:T]) * p["wpe"][T : 3 * T].sum())


@loss(w=V)
def strided_slices(p, x, t):
    """From the start on: of `w[6:18:2]` in three shards XLA cannot partition the backward pass, in plain JAX either."""
    return jnp.mean(x @ p["w"][::2]) + jnp.mean(jnp.sin(x @ p["w"].T)[:, ::3] ** 2)


@loss(w=W)
def slices_beside_the_split_dim(p, x, t):
    upper, lower = p["w"][: D // 2], p["w"][D // 2 :]
    return jnp.mean(x[:, : D // 2] @ upper + jnp.tanh(x[:, D // 2 :] @ lower) * p["w"][3] + p["w"][::-1][0])


@loss(wte=EMBED)
def tied_embedding_and_head(p, x, t):
    logits = jnp.tanh(p["wte"][t]) @ p["wte"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, t).mean()


@loss(wte=EMBED, w=W)
def lookups(p, x, t):
    largest = jnp.take_along_axis(p["wte"], jnp.argmax(p["wte"], axis=1)[:, None], axis=1)
    rows = jnp.take(p["wte"], t, axis=0) + jnp.take(largest, t, axis=0)
    return jnp.mean(rows**2) + jnp.mean(p["w"][jnp.arange(D), jnp.arange(D)[::-1]]) + jnp.mean(p["w"].at[2].add(1.0) ** 2)


@loss(w=W, layers=STACK, gate=BIAS)
def dynamic_slices(p, x, t):
    start = jnp.argmax(p["gate"]) % 3 + 4  # known to the device alone
    rows = lax.dynamic_slice_in_dim(p["w"], start, 4, axis=0) + lax.dynamic_slice_in_dim(p["w"], start, 4, axis=0).sum()
    columns = lax.dynamic_slice_in_dim(p["w"], start, 8, axis=1)
    layer = lax.dynamic_index_in_dim(p["layers"], start - 4, keepdims=False)
    return jnp.mean(jnp.tanh(x[:, :4] @ rows)) + jnp.mean(x @ layer @ columns)


@loss(qkv=(D, 3 * D), out=SQUARE)
def fused_attention(p, x, t):
    heads = (x @ p["qkv"].reshape(D, 3 * D)).reshape(-1, 3, 4, D // 4)
    q, k, v = heads[:, 0], heads[:, 1], heads[:, 2]
    weights = jax.nn.softmax(jnp.einsum("bhd,bgd->bhg", q, k))
    return jnp.mean((jnp.einsum("bhg,bgd->bhd", weights, v).reshape(-1, D) @ p["out"]) ** 2)


@loss(qkv=(D, 3 * D), merged=(4, D // 4, D))
def reshaped_parameters(p, x, t):
    q, k, v = jnp.einsum("bi,ijhd->jbhd", x, p["qkv"].reshape(D, 3, 4, D // 4))
    return jnp.mean(q * k * v) + jnp.mean(jnp.sin(x @ p["merged"].reshape(D, D))) + jnp.mean(p["merged"].reshape(-1) ** 3)


@loss(w=W, b=BIAS, stack=(3, D, H))
def transposed_and_split(p, x, t):
    one, two, three = jnp.split(p["stack"], 3)
    left, right = jnp.split(p["w"], 2, axis=1)
    h = x @ (one[0] + two.squeeze(0) * three[0]) @ p["w"].T + p["b"][None, :]
    return jnp.mean(h @ left * (h @ right)) + jnp.mean(p["stack"].transpose(2, 0, 1).swapaxes(0, 2)[0] ** 2)


@loss(w=W)
def used_in_two_shapes(p, x, t):
    flat = p["w"].reshape(-1)
    return jnp.mean(jnp.sin(x @ p["w"])) + flat[3] * flat[-1] + jnp.mean(x @ p["w"].reshape(H, D).T)


@loss(kernel=(3, D, H), depthwise=(3, 1, H))
def convolutions(p, x, t):
    signal = jnp.sin(x[:, None] * jnp.arange(1.0, T + 1)[:, None])
    spec = ("NTC", "TIO", "NTC")
    h = lax.conv_general_dilated(signal, p["kernel"], (1,), "SAME", dimension_numbers=spec)
    h = lax.conv_general_dilated(jnp.tanh(h), p["depthwise"], (2,), "SAME", dimension_numbers=spec, feature_group_count=H)
    return jnp.mean(h**2)
