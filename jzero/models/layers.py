"""What GPT-2 and Llama share: lookup, rotary positions, and running a stack of layers.

Shapes: B batch, T sequence, V vocabulary, D model dim, H heads, K key-value heads, G = H / K, C head dim.
Activations take the dtype of the parameters they meet; norms, softmax and rotation work in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jzero import remat
from jzero.attention import split_sequence
from jzero.models.config import RopeScaling
from jzero.models.matmul import dot_general, matmul_transposed

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q[B, T, H, C], k and v[B, T, K, C] -> [B, T, H, C]


class Embedding(nnx.Module):
    """A lookup table whose result has the dtype of the table (`nnx.Embed` fixes its dtype when it is made)."""

    def __init__(self, num_rows: int, dim: int, *, stddev: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(stddev * jax.random.normal(rngs.params(), (num_rows, dim)))  # [V, D]

    def __call__(self, ids: jax.Array) -> jax.Array:
        return _not_by_sequence(jnp.take(self.embedding[...], _not_by_sequence(ids), axis=0))

    def logits(self, x: jax.Array) -> jax.Array:
        return matmul_transposed(x, self.embedding[...])


def _not_by_sequence(x: jax.Array) -> jax.Array:
    """Where `tensor` may split the table's rows, they are looked up for the whole sequence, which is split after that: XLA's
    partitioner ends the process over a lookup in which table and indices are split (`ExpandDeviceGroupsWithIota`, jax 0.11.2).
    """
    axes = set(jax.sharding.get_abstract_mesh().auto_axes)
    if not {"sequence", "tensor"} <= axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(PartitionSpec.UNCONSTRAINED, *(None,) * (x.ndim - 1)))


def linear(num_in: int, num_out: int, *, stddev: float, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    kernel_init = nnx.initializers.normal(stddev)
    return nnx.Linear(num_in, num_out, use_bias=use_bias, kernel_init=kernel_init, dot_general=dot_general, rngs=rngs)


def rotate(x: jax.Array, *, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Rotary positions on x[B, T, H, C], first half of C paired with the second (as published weights are stored).

    Su et al.: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    """
    frequencies = _rope_frequencies(x.shape[-1], theta, scaling)  # [C / 2]
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies  # [T, C / 2]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    base = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return base
    # Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in 1 / wavelength.
    turns = scaling.original_seq * base / (2 * jnp.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * base + (1 - blend) * base / scaling.factor


def run_layers(layer: Callable[[Any, Any], Any], x: Any, layers: Any) -> Any:
    """`x`, an array or several, through every layer: a scan over stacked parameters, or a loop over a list of them.

    On a mesh with an axis `sequence`, x[B, T_sequence, D] at each end of a layer.
    """
    split = lambda x, params: _by_sequence(layer(x, params))
    x = _by_sequence(x)
    if isinstance(layers, list | tuple):
        body = remat.wrap_layer(split, scanned=False)
        for params in layers:
            x = body(x, params)
        return x
    body = remat.wrap_layer(split)
    return jax.lax.scan(lambda x, params: (body(x, params), None), x, layers)[0]


def _by_sequence(x: Any) -> Any:
    """Of what travels between layers the activations, split over `sequence`."""
    return jax.tree.map(lambda leaf: split_sequence(leaf) if leaf.ndim > 2 else leaf, x)
