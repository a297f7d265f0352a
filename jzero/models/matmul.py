"""Activations times a weight, with a weight gradient that XLA:CPU computes at full speed.

On CPU a product whose left operand is contracted over its first dim, as every weight gradient x^T g is, goes to a slow
path: 41 GFLOP/s a core where the same product with x transposed beforehand reaches 82 (jax 0.11.2, x[1024, 256],
g[1024, 8192]). So the transpose is made, between barriers that keep the compiler from folding it back. Other back ends
get the plain product: the choice falls when the program is lowered.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x[..., D] times kernel[D, F] -> [..., F]."""
    return jnp.dot(x, kernel)


@jax.custom_vjp
def matmul_transposed(x: jax.Array, table: jax.Array) -> jax.Array:
    """x[..., D] times table[V, D] transposed -> [..., V]: logits from an embedding table."""
    return jnp.einsum("...d,vd->...v", x, table)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`matmul` in the place that `nnx.Linear(dot_general=...)` has for it."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    assert not any(options.values()), options
    return matmul(x, kernel)


def _weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x^T g, summed over all leading dims -> [D, F]. They are not merged, for the partitioner could not follow a split one."""
    return jax.lax.platform_dependent(x, g, cpu=_product_of_transposed_copy, default=_product)


def _product(x: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.tensordot(jnp.moveaxis(x, -1, 0), g, x.ndim - 1)


def _product_of_transposed_copy(x: jax.Array, g: jax.Array) -> jax.Array:
    x = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
    return jax.lax.optimization_barrier(jnp.tensordot(x, g, x.ndim - 1))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.dot(x, kernel), (x, kernel)  # not `matmul`: a remat policy must see the product


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return matmul_transposed(g, kernel), _weight_gradient(x, g)


def _forward_transposed(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum("...d,vd->...v", x, table), (x, table)


def _backward_transposed(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = saved
    return matmul(g, table), _weight_gradient(x, g).T


matmul.defvjp(_forward, _backward)
matmul_transposed.defvjp(_forward_transposed, _backward_transposed)
