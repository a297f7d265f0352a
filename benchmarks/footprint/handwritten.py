"""The footprint reference: ZeRO stages 1 to 3 of a 166M-parameter GPT written by hand, compiled for 16 H100s.

    JAX_PLATFORMS=cpu python -m benchmarks.footprint.handwritten

What a careful person writes with `shard_map`, `all_gather` and `psum_scatter` and no library. The footprint law compares
jzero with it: the compiled temporaries must agree within 5%. Nothing here imports jzero except the compile-only devices and
the audit that prints the table.
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
DATA = "data"


class Config(NamedTuple):
    """The model of DESIGN.md section 4, and the batch that reproduces its numbers."""

    vocab: int = 32000
    width: int = 1024
    num_layers: int = 8
    num_heads: int = 16
    length: int = 1024
    batch_per_device: int = 1  # sequences per microbatch


CONFIG = Config()


def make_params_abstract(config: Config = CONFIG) -> Params:
    """fp32 leaves as shapes; layers stacked on dim 0. 166,232,064 elements, no biases."""
    v, d, n = config.vocab, config.width, config.num_layers
    shapes = {
        "embed": (v, d),
        "head": (d, v),
        "norm": (d,),
        "layers": {
            "norm1": (n, d), "wqkv": (n, d, 3 * d), "wo": (n, d, d),
            "norm2": (n, d), "w1": (n, d, 4 * d), "w2": (n, 4 * d, d),
        },
    }  # fmt: skip
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def specs(params: Params) -> Params:
    """Every leaf split over `data` on its first dim that is not the stack of layers."""
    layers = jax.tree.map(lambda leaf: P(None, DATA), params["layers"])
    return {name: layers if name == "layers" else P(DATA) for name in params}


# the model ---------------------------------------------------------------------------------------------------------


def loss_fn(params: Params, tokens: jax.Array, config: Config = CONFIG, use: Callable | None = None) -> jax.Array:
    """Mean next-token cross-entropy of `tokens` i32[B, T + 1], computed in bf16, the logits in fp32.

    `use` makes a leaf ready where it is used; by default it only casts.
    """
    use = use or (lambda w: w.astype(jnp.bfloat16))
    x = use(params["embed"])[tokens[:, :-1]]

    def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x = x + attention(rms_norm(x, use(w["norm1"])), use(w["wqkv"]), use(w["wo"]), config)
        x = x + jax.nn.gelu(rms_norm(x, use(w["norm2"])) @ use(w["w1"])) @ use(w["w2"])
        return x, None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    logits = (rms_norm(x, use(params["norm"])) @ use(params["head"])).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def attention(x: jax.Array, wqkv: jax.Array, wo: jax.Array, config: Config) -> jax.Array:
    """Plain causal attention of x[B, T, D]."""
    b, t, d = x.shape
    q, k, v = jnp.moveaxis((x @ wqkv).reshape(b, t, 3, config.num_heads, -1), 2, 0)
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(x.dtype), v)
    return mixed.reshape(b, t, d) @ wo


# the stages --------------------------------------------------------------------------------------------------------


def gather(w: jax.Array) -> jax.Array:
    """One leaf made whole in bf16. Its transpose is a psum_scatter in bf16."""
    return jax.lax.all_gather(w.astype(jnp.bfloat16), DATA, tiled=True)


@jax.custom_vjp
def attach(whole: jax.Array, sink: jax.Array) -> jax.Array:
    """The whole leaf; its gradient goes to the sink, a zero of the shard's shape, already summed and scattered."""
    return whole


attach.defvjp(
    lambda whole, sink: (whole, None),
    lambda _, grad: (jnp.zeros_like(grad), jax.lax.psum_scatter(grad, DATA, tiled=True).astype(jnp.float32)),
)


def grads_1(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather once, accumulate whole gradients in fp32, reduce once."""
    whole = gather_all(params)
    grad = lambda tokens: jax.value_and_grad(loss)(whole, tokens)
    value, grads = accumulate(grad, whole, microbatches)
    return value, scatter_all(grads)


def grads_2(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather once, scatter each layer's gradient as it appears."""
    whole = gather_all(params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def loss_of_sinks(sinks: Params, tokens: jax.Array) -> jax.Array:
        pairs = jax.tree.map(lambda w, sink: Pair(w, sink), whole, sinks)
        return loss(pairs, tokens, use=lambda pair: attach(pair.whole, pair.sink))

    return accumulate(lambda tokens: jax.value_and_grad(loss_of_sinks)(zeros, tokens), params, microbatches)


def grads_3(params: Params, microbatches: jax.Array, loss: Callable) -> tuple[jax.Array, Params]:
    """Gather at each use; what comes back is scattered by the gather's transpose."""
    return accumulate(lambda tokens: jax.value_and_grad(functools.partial(loss, use=gather))(params, tokens), params, microbatches)


class Pair(NamedTuple):
    """A whole leaf and the sink of its gradient; scans slice both."""

    whole: jax.Array
    sink: jax.Array


GRADS = {1: grads_1, 2: grads_2, 3: grads_3}


def gather_all(params: Params) -> Params:
    return jax.tree.map(lambda w, spec: jax.lax.all_gather(w.astype(jnp.bfloat16), DATA, axis=len(spec) - 1, tiled=True), params, specs(params))


def scatter_all(grads: Params) -> Params:
    return jax.tree.map(lambda g, spec: jax.lax.psum_scatter(g, DATA, scatter_dimension=len(spec) - 1, tiled=True), grads, specs(grads))


def accumulate(grad: Callable, like: Params, microbatches: jax.Array) -> tuple[jax.Array, Params]:
    """The mean loss and gradient over `microbatches` i32[k, B, T + 1], summed in fp32."""
    if len(microbatches) == 1:
        value, grads = grad(microbatches[0])
        return value, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def add(total: tuple, tokens: jax.Array) -> tuple[tuple, None]:
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grad(tokens)), None

    zero = jnp.float32(0), jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), like)
    total, _ = jax.lax.scan(add, zero, microbatches)
    return jax.tree.map(lambda t: t / len(microbatches), total)


def hand_step(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG, optimizer: Any = None) -> Callable:
    """`(state, tokens) -> (state, metrics)` with state `(params, opt_state)` and tokens i32[global batch, T + 1]."""
    optimizer = optimizer or optax.adamw(3e-4)
    loss = functools.partial(loss_fn, config=config)

    def local(params: Params, tokens: jax.Array) -> tuple[jax.Array, Params]:
        value, grads = GRADS[stage](params, tokens.reshape(accumulate, -1, tokens.shape[-1]), loss)
        return jax.lax.pmean(value, DATA), jax.tree.map(lambda g: g / mesh.shape[DATA], grads)

    def step(state: tuple, tokens: jax.Array) -> tuple[tuple, dict]:
        params, opt_state = state
        split = specs(params)
        value, grads = jax.shard_map(local, mesh=mesh, in_specs=(split, P(DATA)), out_specs=(P(), split), check_vma=False)(
            params, tokens
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.global_norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return step


# the table ---------------------------------------------------------------------------------------------------------


def abstract_state(mesh: Mesh, config: Config = CONFIG, optimizer: Any = None) -> tuple[Params, Any]:
    """Shapes and shardings of `(params, opt_state)`: moments are split like their parameters."""
    params = make_params_abstract(config)
    shapes = jax.eval_shape((optimizer or optax.adamw(3e-4)).init, params)
    place = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    split = specs(params)
    moments = optax.tree_utils.tree_map_params(
        optimizer or optax.adamw(3e-4), place, shapes, split, transform_non_params=lambda leaf: place(leaf, P())
    )
    return jax.tree.map(place, params, split), moments


def compile_step(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG) -> Any:
    rows = config.batch_per_device * accumulate * mesh.size
    tokens = jax.ShapeDtypeStruct((rows, config.length + 1), jnp.int32, sharding=NamedSharding(mesh, P(DATA)))
    step = jax.jit(hand_step(stage, mesh, accumulate, config), donate_argnums=0)
    return step.lower(abstract_state(mesh, config), tokens).compile()


def row(stage: int, mesh: Mesh, accumulate: int, config: Config = CONFIG) -> str:
    """One line of the table: executions per step and megabytes of the full side per kind, and the temporaries."""
    from jzero.audit import audit

    measured = audit(compile_step(stage, mesh, accumulate, config), mesh)
    cells = []
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
        ops = [one for one in measured.collectives if one.kind == kind]
        total = sum(one.count * one.full_bytes for one in ops) / 1e6
        cells.append(f"{sum(one.count for one in ops):4d} ({total:6,.0f} MB)")
    return f"{stage:5d} {accumulate:10d}  {'  '.join(cells)}  {measured.temp_bytes / 1e6:8,.0f} MB"


def main() -> None:
    from jzero.topology import topology

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100:2x8")
    target = parser.parse_args().target
    mesh = Mesh(np.array(topology(target)), (DATA,), axis_types=(AxisType.Auto,))
    print(f"{target}, {CONFIG}\nstage accumulate  all-gather          reduce-scatter     all-reduce         all-to-all           temp")
    for stage, k in ((3, 1), (1, 4), (2, 4), (3, 4)):
        print(row(stage, mesh, k))


if __name__ == "__main__":
    main()
