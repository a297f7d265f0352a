"""The programs that the pass must not change, as users write them: losses, and whole train steps.

`LOSSES` run in both engines; `STEPS`, whole train steps, in the opaque one. A loss that is expected to stay global, since its
examples meet or cannot be followed, says `meets=True`. Every size is a multiple of 3 and of 8, save where a program is about
that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

D, H, T, L, B = 24, 48, 6, 3, 24  # width, hidden width and vocabulary, length, layers, batch
W, V, SQUARE, BIAS, EMBED = (D, H), (H, D), (D, D), (D,), (H, D)
STACK = (L, D, D)


class Loss(NamedTuple):
    """A loss `fn(params, x, t)`; with `on_mesh` also `mesh=`."""

    fn: Callable[..., Any]
    leaves: dict[str, Any]  # name -> shape, or a function that makes the leaf
    meets: bool = False
    local: bool = False  # although the analysis cannot tell, it is a mean over examples
    on_mesh: bool = False
    tensor: int = 1  # size of a tensor axis beside data
    trains: Any = None  # path -> bool: not differentiated, so for jzero's own step only
    opaque: bool = True
    exact: Callable[..., Any] | None = None  # the same in float32, for a loss that computes in 16 bits

    def params(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {name: make(rng) if callable(make) else normal(rng, make) for name, make in self.leaves.items()}


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(max(1, *shape[-1:])), jnp.float32)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Features `x[B, D]` and tokens `t[B, T]`."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(B, D)).astype(np.float32), rng.integers(0, H, (B, T), dtype=np.int32)


LOSSES: dict[str, Loss] = {}
STEPS: dict[str, Callable[[], tuple[Any, Callable[..., Any]]]] = {}


def loss(*, meets=False, local=False, on_mesh=False, tensor=1, trains=None, opaque=True, exact=None, **leaves):
    """Enters a function into `LOSSES`, with the shapes of the parameters that it takes."""

    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        LOSSES[fn.__name__] = Loss(fn, leaves, meets, local, on_mesh, tensor, trains, opaque, exact)
        return fn

    return enter


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["v"]


# derivatives of the user's own ---------------------------------------------------------------------------------------


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


# parameters as values ------------------------------------------------------------------------------------------------


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


# views: slices, reshapes, lookups ------------------------------------------------------------------------------------


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


# control flow --------------------------------------------------------------------------------------------------------


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


# rematerialisation ---------------------------------------------------------------------------------------------------


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "only_names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "any_names_but": jax.checkpoint_policies.save_anything_except_these_names("weight"),
    "offloadless": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["hidden"], names_which_can_be_offloaded=[], offload_src="device", offload_dst="pinned_host"
    ),
}


def rematerialised(policy, p, x, t):
    def layer(h, w):
        return checkpoint_name(jnp.tanh(h @ checkpoint_name(w, "weight")), "hidden") @ p["shared"], None

    h = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["first"]), policy=policy)(p, x)
    return jnp.mean(lax.scan(jax.checkpoint(layer, policy=policy), h, p["layers"])[0] ** 2)


for _name, _policy in POLICIES.items():
    LOSSES[f"remat_{_name}"] = Loss(partial(rematerialised, _policy), {"first": SQUARE, "shared": SQUARE, "layers": STACK})


@loss(w=W, v=V)
def remat_of_everything(p, x, t):
    return jax.checkpoint(lambda p, x: jnp.mean(jax.checkpoint(mlp)(p, x) ** 2))(p, x)


@loss(w=W, v=V)
def named_parameter(p, x, t):
    p = {name: checkpoint_name(leaf, name) for name, leaf in p.items()}
    policy = jax.checkpoint_policies.save_only_these_names("w")
    return jax.checkpoint(lambda p, x: jnp.mean(mlp(p, x) ** 2), policy=policy)(p, x)


# what lies outside JAX's algebra -------------------------------------------------------------------------------------


def _double(ref, out):
    out[...] = ref[...] * 2


@jax.custom_vjp
def doubled(w):
    return pl.pallas_call(_double, out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype), interpret=True)(w)


doubled.defvjp(lambda w: (doubled(w), None), lambda _, cotangent: (doubled(cotangent),))


@loss(meets=True, local=True, w=W)
def pallas_on_a_parameter(p, x, t):
    return jnp.mean(jnp.tanh(x @ doubled(p["w"])))


@loss(meets=True, local=True, w=W, v=V)
def pallas_on_the_batch(p, x, t):
    return jnp.mean(doubled(jnp.tanh(x @ doubled(p["w"]))) @ p["v"])


@loss(meets=True, local=True, w=W)
def callback_on_a_parameter(p, x, t):
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    scale = jax.pure_callback(lambda w: np.float32(np.abs(w).max()), scalar, lax.stop_gradient(p["w"]))
    return jnp.mean(jnp.tanh(x @ p["w"])) / scale


@loss(meets=True, local=True, w=W)
def callback_on_the_batch(p, x, t):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jnp.mean(jnp.tanh(jax.pure_callback(lambda x: np.asarray(x) * 2, shape, x) @ p["w"]))


@loss(w=W, v=V)
def debug_print(p, x, t):
    jax.debug.print("largest weight {w}", w=jnp.max(p["w"]))
    jax.debug.callback(lambda x: None, x)
    return jnp.mean(jax.checkpoint(mlp)(p, x) ** 2)


@loss(on_mesh=True, w=W, v=V)
def constraint_on_a_data_axis(p, x, t, mesh):
    h = lax.with_sharding_constraint(jnp.tanh(x @ p["w"]), NamedSharding(mesh, PartitionSpec("data")))
    return jnp.mean((h @ p["v"]) ** 2)


@loss(on_mesh=True, layers=STACK, v=SQUARE)
def constraints_inside_calls(p, x, t, mesh):
    by_row = NamedSharding(mesh, PartitionSpec("data", None))

    @jax.checkpoint
    def layer(h, w):
        return jax.jit(lambda h: lax.with_sharding_constraint(h, by_row))(jnp.tanh(h @ w)), None

    h, _ = lax.scan(layer, lax.with_sharding_constraint(x, by_row), p["layers"])
    return jnp.mean(lax.cond(p["v"][0, 0] > 0, lambda h: lax.with_sharding_constraint(h @ p["v"], by_row), lambda h: h, h) ** 2)


@loss(on_mesh=True, tensor=2, w=W, v=V)
def constraint_on_another_axis(p, x, t, mesh):
    h = lax.with_sharding_constraint(jnp.tanh(x @ p["w"]), NamedSharding(mesh, PartitionSpec(None, "tensor")))
    return jnp.mean((h @ p["v"]) ** 2)


@loss(on_mesh=True, tensor=2, w=W, v=V)
def constraint_on_both_axes(p, x, t, mesh):
    h = lax.with_sharding_constraint(jnp.tanh(x @ p["w"]), NamedSharding(mesh, PartitionSpec("data", "tensor")))
    return jnp.mean((h @ p["v"]) ** 2)


@loss(on_mesh=True, tensor=2, layers=STACK, v=SQUARE)
def constraints_in_loops(p, x, t, mesh):
    by_column, by_both = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((None, "tensor"), ("data", "tensor")))

    def layer(h, w):
        return lax.with_sharding_constraint(jnp.tanh(h @ w), by_column), None

    h, _ = lax.scan(layer, x, p["layers"])
    h = lax.fori_loop(0, 2, lambda i, h: jax.checkpoint(lambda h: lax.with_sharding_constraint(h @ p["v"], by_both))(h), h)
    return jnp.mean(h**2)


@loss(meets=True, on_mesh=True, w=W, v=V)
def own_shard_map_over_data(p, x, t, mesh):
    specs = (PartitionSpec(), PartitionSpec("data"))
    local = jax.shard_map(mlp, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False)
    return jnp.mean(local(p, x) ** 2)


@loss(meets=True, on_mesh=True, tensor=2, w=W, v=V)
def own_shard_map_over_tensor(p, x, t, mesh):
    def local(w, v, x):
        return lax.psum(jnp.tanh(x @ w) @ v, "tensor")

    specs = (PartitionSpec(None, "tensor"), PartitionSpec("tensor"), PartitionSpec())
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jnp.mean(run(p["w"], p["v"], x) ** 2)


@jax.custom_vjp
def doubled_by_platform(w):
    kernel = pl.pallas_call(_double, out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype))  # cannot be lowered for a CPU
    return lax.platform_dependent(w, cpu=lambda w: w * 2, default=kernel)


doubled_by_platform.defvjp(lambda w: (doubled_by_platform(w), None), lambda _, cotangent: (doubled_by_platform(cotangent),))


@loss(meets=True, local=True, w=W)
def platform_dependent(p, x, t):
    return jnp.mean(jnp.tanh(x @ doubled_by_platform(p["w"])))


# whole train steps ---------------------------------------------------------------------------------------------------


def step(make: Callable[[], tuple[Any, Callable[..., Any]]]) -> Callable[[], tuple[Any, Callable[..., Any]]]:
    """Enters a function that makes `(state, train step)` into `STEPS`."""
    STEPS[make.__name__] = make
    return make


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    return {name: normal(rng, shape) for name, shape in (shapes or {"w": W, "v": V, "b": BIAS}).items()}


def regression(p: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((mlp(p, x) + p["b"] - jnp.cos(x)) ** 2)


def trained_by(tx: Any) -> tuple[Any, Callable[..., Any]]:
    def train_step(state, x, t):
        params, opt_state = state
        value, grads = jax.value_and_grad(regression)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = weights()
    return (params, tx.init(params)), train_step


NORMALISING = ("adafactor", "masked", "muon")  # optimizers that turn rounding of a small gradient into a large difference


@step
def adafactor():
    return trained_by(optax.adafactor(1e-2, min_dim_size_to_factor=8))


@step
def masked():
    return trained_by(optax.masked(optax.adam(1e-2), {"w": True, "v": False, "b": True}))


@step
def muon():
    return trained_by(contrib.muon(1e-2))


@step
def clipped_and_averaged():
    return trained_by(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9), optax.ema(0.9)))


SGD = optax.sgd(0.1, momentum=0.9)


def sgd(state, x):
    params, opt_state = state
    value, grads = jax.value_and_grad(regression)(params, x)
    updates, opt_state = SGD.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def sgd_state():
    params = weights()
    return params, SGD.init(params)


@step
def several_steps_in_a_fori_loop():
    def train_step(state, x, t):
        return lax.fori_loop(0, 3, lambda i, state: sgd(state, x * (1 + i))[0], state), None

    return sgd_state(), train_step


@step
def several_steps_in_a_scan():
    def train_step(state, x, t):
        return lax.scan(sgd, state, jnp.stack([x, 2 * x, x + 1]))

    return sgd_state(), train_step


@step
def steps_until_small():
    def train_step(state, x, t):
        def body(carry):
            state, _, num_steps = carry
            return *sgd(state, x), num_steps + 1

        go_on = lambda carry: (carry[1] > 0.1) & (carry[2] < 4) & (jnp.abs(carry[0][0]["w"]).max() < 100)
        state, value, _ = lax.while_loop(go_on, body, (state, jnp.inf, 0))
        return state, value

    return sgd_state(), train_step


@step
def own_accumulation():
    def train_step(state, x, t):
        params, opt_state = state

        def body(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(regression)(params, x)), None

        grads, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), x.reshape(-1, 2, D).swapaxes(0, 1))
        updates, opt_state = SGD.update(jax.tree.map(lambda g: g / 2, grads), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(grads)

    return sgd_state(), train_step


@step
def update_under_cond():
    def train_step(state, x, t):
        after, value = sgd(state, x)
        return lax.cond(jnp.isfinite(value), lambda: after, lambda: state), value

    return sgd_state(), train_step


@step
def step_inside_jit():
    inner = jax.jit(sgd, donate_argnums=0)
    return sgd_state(), lambda state, x, t: inner(state, x)


@step
def update_under_vmap():
    """An ensemble: the members' parameters are stacked, and so are their updates."""
    params = weights(w=(4, *W), v=(4, *V), b=(4, *BIAS))
    return (params, SGD.init(params)), lambda state, x, t: jax.vmap(sgd, in_axes=(0, None))(state, x)


@step
def moving_average_and_counters():
    def train_step(state, x, t):
        key, noise = jax.random.split(state["key"])
        params = jax.tree.map(lambda leaf: leaf + 1e-3 * jax.random.normal(noise, leaf.shape), state["params"])
        (params, opt_state), value = sgd((params, state["opt_state"]), x)
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["ema"], params)
        seen = state["seen"].at[t.reshape(-1)].add(1)
        after = {"params": params, "opt_state": opt_state, "ema": ema, "seen": seen, "step": state["step"] + 1, "key": key}
        return after, value

    params, opt_state = sgd_state()
    others = {"seen": jnp.zeros(H, jnp.int32), "step": 0, "key": jax.random.key(0)}
    return {"params": params, "opt_state": opt_state, "ema": params, **others}, train_step


@step
def one_array_twice():
    """A target network that starts as the very arrays of the parameters."""

    def train_step(state, x, t):
        (params, opt_state), value = sgd((state["params"], state["opt_state"]), x + mlp(state["target"], x))
        target = optax.incremental_update(params, state["target"], 0.01)
        return {"params": params, "opt_state": opt_state, "target": target}, value

    params, opt_state = sgd_state()
    return {"params": params, "opt_state": opt_state, "target": params}, train_step


class Mlp(eqx.Module):
    w: jax.Array
    v: jax.Array
    activation: Callable[..., Any]

    def __call__(self, x):
        return self.activation(x @ self.w) @ self.v


@step
def callable_leaf_in_the_state():
    def train_step(state, x, t):
        model, opt_state = state
        value, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(x) - x) ** 2))(model)
        updates, opt_state = SGD.update(grads, opt_state)
        return (eqx.apply_updates(model, updates), opt_state), value

    model = Mlp(**weights(w=W, v=V), activation=jnp.tanh)
    return (model, SGD.init(eqx.filter(model, eqx.is_inexact_array))), train_step


@step
def sharpness_aware():
    """Two gradients a step, the second at parameters moved by the first (SAM)."""

    def train_step(state, x, t):
        params, opt_state = state
        grads = jax.grad(regression)(params, x)
        scale = 0.05 / optax.tree.norm(grads)
        moved = jax.tree.map(lambda leaf, grad: leaf + scale * grad, params, grads)
        value, grads = jax.value_and_grad(regression)(moved, x)
        updates, opt_state = SGD.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return sgd_state(), train_step


@step
def hessian_vector_product():
    def train_step(state, x, t):
        params, opt_state = state
        value, grads = jax.value_and_grad(regression)(params, x)
        _, curved = jax.jvp(lambda params: jax.grad(regression)(params, x), (params,), (grads,))
        updates, opt_state = SGD.update(curved, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return sgd_state(), train_step
