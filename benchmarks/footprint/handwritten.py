"""The footprint reference: ZeRO stages 1 to 3 of a 166M-parameter GPT written by hand, compiled for 16 H100s.

    JAX_PLATFORMS=cpu python -m benchmarks.footprint.handwritten

What a careful person writes with `shard_map`, `all_gather` and `psum_scatter` and no library. The footprint law holds jzero
to these temporaries, within 5%. jzero is imported for the described devices and for the audit that counts, nowhere else.

The batch, the heads and the attention's dtype were searched until the compiler gave the figures of the design charter
(637 MB at stage 3 without accumulation; 1,869, 1,018 and 703 MB at stages 1, 2 and 3 with four microbatches).
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Params = dict[str, Any]
Use = Callable[[str, Any], jax.Array]  # (the leaf's name, what the model holds of it) -> the whole leaf in bf16

DATA = "data"
# Per leaf, the dim that is split, the stack of layers not counted: the largest one, and of equals the last.
SPLIT = {"embed": 0, "head": 1, "norm": 0, "norm1": 0, "wqkv": 1, "wo": 1, "norm2": 0, "w1": 1, "w2": 0}
TABLE = ((3, 1), (1, 4), (2, 4), (3, 4))  # (stage, accumulate)


class Config(NamedTuple):
    """The model, and the batch of one microbatch on one device."""

    vocab: int = 32000
    width: int = 1024
    num_layers: int = 8
    num_heads: int = 16
    length: int = 1024
    batch_per_device: int = 2


CONFIG = Config()
OPTIMIZER = optax.adamw(3e-4)


# the model -----------------------------------------------------------------------------------------------------------


def make_params_abstract(config: Config = CONFIG) -> Params:
    """The fp32 leaves as shapes, layers stacked on dim 0: 166,216,704 elements, no biases."""
    v, d, n = config.vocab, config.width, config.num_layers
    layers = {"norm1": (d,), "wqkv": (d, 3 * d), "wo": (d, d), "norm2": (d,), "w1": (d, 4 * d), "w2": (4 * d, d)}
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    stacked = {name: leaf(n, *shape) for name, shape in layers.items()}
    return {"embed": leaf(v, d), "head": leaf(d, v), "norm": leaf(d), "layers": stacked}


def cast(name: str, w: jax.Array) -> jax.Array:
    return w.astype(jnp.bfloat16)


def loss_fn(params: Params, tokens: jax.Array, config: Config = CONFIG, use: Use = cast) -> jax.Array:
    """Mean next-token cross-entropy of tokens i32[B, T + 1]: bf16, logits and loss in fp32, every layer rematerialised."""
    x = use("embed", params["embed"])[tokens[:, :-1]]

    def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x = x + attention(rms_norm(x, use("norm1", w["norm1"])), use("wqkv", w["wqkv"]), use("wo", w["wo"]), config)
        x = x + jax.nn.gelu(rms_norm(x, use("norm2", w["norm2"])) @ use("w1", w["w1"])) @ use("w2", w["w2"])
        return x, None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    logits = rms_norm(x, use("norm", params["norm"])) @ use("head", params["head"])
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def attention(x: jax.Array, wqkv: jax.Array, wo: jax.Array, config: Config) -> jax.Array:
    """Plain causal attention of x[B, T, D], softmax in bf16 (in fp32 the temporaries are 84 MB more)."""
    q, k, v = (y.reshape(*x.shape[:2], config.num_heads, -1) for y in jnp.split(x @ wqkv, 3, axis=-1))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)
    return mixed.reshape(x.shape) @ wo


# the stages: how a shard of the gradient comes about on one device -----------------------------------------------------


def gather(name: str, w: jax.Array, num_stacked: int = 0) -> jax.Array:
    """A leaf made whole, in bf16 on the wire. Its transpose is a `psum_scatter` in bf16."""
    return jax.lax.all_gather(w.astype(jnp.bfloat16), DATA, axis=SPLIT[name] + num_stacked, tiled=True)


def scatter(name: str, grad: jax.Array, num_stacked: int = 0) -> jax.Array:
    return jax.lax.psum_scatter(grad, DATA, scatter_dimension=SPLIT[name] + num_stacked, tiled=True)


def each_leaf(function: Callable, params: Params) -> Params:
    """`function(name, leaf, number of stacked dims)` over the leaves."""
    stacked = {name: function(name, leaf, 1) for name, leaf in params["layers"].items()}
    return {name: stacked if name == "layers" else function(name, leaf, 0) for name, leaf in params.items()}


def grads_1(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather once, accumulate whole gradients in fp32, reduce once in fp32."""
    whole = each_leaf(gather, params)
    value, grads = mean_over(microbatches, lambda tokens: jax.value_and_grad(loss)(whole, tokens), like=whole)
    return value, each_leaf(scatter, grads)


class Attached(NamedTuple):
    """A whole leaf, and a zero of its shard's shape to which its gradient goes. A scan slices both."""

    whole: jax.Array
    sink: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attach(name: str, whole: jax.Array, sink: jax.Array) -> jax.Array:
    """The whole leaf where it is used; its gradient is summed and scattered there and then, into the sink."""
    return whole


attach.defvjp(
    lambda name, whole, sink: (whole, None),
    lambda name, _, grad: (jnp.zeros_like(grad), scatter(name, grad).astype(jnp.float32)),
)


def grads_2(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather once, scatter each layer's gradient as it appears."""
    whole = each_leaf(gather, params)

    def loss_of(sinks: Params, tokens: jax.Array) -> jax.Array:
        return loss(jax.tree.map(Attached, whole, sinks), tokens, use=lambda name, leaf: attach(name, *leaf))

    sinks = jax.tree.map(jnp.zeros_like, params)
    return mean_over(microbatches, lambda tokens: jax.value_and_grad(loss_of)(sinks, tokens), like=params)


def grads_3(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather at each use, forward and backward; the gather's transpose scatters."""
    gathering = functools.partial(loss, use=gather)
    return mean_over(microbatches, lambda tokens: jax.value_and_grad(gathering)(params, tokens), like=params)


def mean_over(microbatches: jax.Array, value_and_grads: Callable, like: Params) -> tuple[jax.Array, Params]:
    """Mean loss and gradients over i32[k, B, T + 1], accumulated in fp32."""
    if len(microbatches) == 1:
        return value_and_grads(microbatches[0])

    def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, value_and_grads(tokens)), None

    zeros = jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda t: t / len(microbatches), total)


GRADS = {1: grads_1, 2: grads_2, 3: grads_3}


def hand_step(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG) -> Callable:
    """`((params, opt_state), tokens i32[B, T + 1]) -> ((params, opt_state), metrics)`; the state rests split over `data`."""
    loss = functools.partial(loss_fn, config=config)

    def local(params: Params, tokens: jax.Array) -> tuple[jax.Array, Params]:
        value, grads = GRADS[stage](params, tokens.reshape(accumulate, -1, tokens.shape[-1]), loss)
        return jax.lax.pmean(value, DATA), jax.tree.map(lambda g: g.astype(jnp.float32) / mesh.shape[DATA], grads)

    def step(state: tuple[Params, Any], tokens: jax.Array) -> tuple[tuple[Params, Any], dict[str, jax.Array]]:
        params, opt_state = state
        shapes = (specs(params), P(DATA)), (P(), specs(params))
        value, grads = jax.shard_map(local, mesh=mesh, in_specs=shapes[0], out_specs=shapes[1], check_vma=False)(params, tokens)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value, "grad_norm": optax.global_norm(grads)}

    return step


def specs(params: Params) -> Params:
    return each_leaf(lambda name, leaf, num_stacked: P(*[None] * (num_stacked + SPLIT[name]), DATA), params)


# the table -----------------------------------------------------------------------------------------------------------


def abstract_args(mesh: Mesh, accumulate: int, config: Config = CONFIG) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The step's arguments as shapes with shardings: `(params, opt_state)` and the tokens of the whole mesh."""
    params = make_params_abstract(config)
    place = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    by_shape = {leaf.shape: spec for leaf, spec in zip(*map(jax.tree.leaves, (params, specs(params))), strict=True)}
    state = params, jax.eval_shape(OPTIMIZER.init, params)
    rows = config.batch_per_device * accumulate * mesh.size
    tokens = place(jax.ShapeDtypeStruct((rows, config.length + 1), jnp.int32), P(DATA))
    return jax.tree.map(lambda leaf: place(leaf, by_shape.get(leaf.shape, P())), state), tokens


def compile_step(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG) -> jax.stages.Compiled:
    step = jax.jit(hand_step(stage, mesh, accumulate, config), donate_argnums=0)
    return step.lower(*abstract_args(mesh, accumulate, config)).compile()


def row(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG) -> str:
    """Executions per step and megabytes of the full side, per kind of collective, and the temporaries."""
    from jzero.audit import audit

    measured = audit(compile_step(stage, mesh, accumulate, config), mesh)
    cells = []
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
        ops = [one for one in measured.collectives if one.kind == kind]
        cells.append(f"{sum(one.count for one in ops):3d} ({sum(one.count * one.full_bytes for one in ops) / 1e6:5,.0f})")
    return f"{stage:5d}  {accumulate:10d}  " + "".join(f"{cell:>16}" for cell in cells) + f"{measured.temp_bytes / 1e6:9,.0f}"


def main() -> None:
    from jzero.topology import topology

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100:2x8")
    target = parser.parse_args().target
    mesh = Mesh(np.array(topology(target)), (DATA,), axis_types=(AxisType.Auto,))
    print(f"jax {jax.__version__}, {target}, {CONFIG}; executions per step (MB)")
    titles = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    print("stage  accumulate  " + "".join(f"{title:>16}" for title in titles) + "  temp MB")
    for stage, accumulate in TABLE:
        print(row(stage, mesh, accumulate), flush=True)


if __name__ == "__main__":
    main()
