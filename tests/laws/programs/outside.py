"""Losses with what lies outside JAX's algebra: kernels, callbacks, placement."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from programs.table import SQUARE, STACK, V, W, loss, mlp


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
