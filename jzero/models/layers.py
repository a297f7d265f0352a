"""What GPT-2 and Llama share: lookup, causal attention, rotary positions, and running a stack of layers.

Shapes: B batch, T sequence, V vocabulary, D model dim, H heads, K key-value heads, G = H / K, C head dim.
Activations take the dtype of the parameters they meet; norms, softmax and rotation work in float32.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jzero import remat
from jzero.models.config import RopeScaling
from jzero.models.matmul import dot_general, matmul_transposed

Attention = Literal["plain", "cudnn"]
_MASKED = -1e30  # finite: a row of -inf alone would make NaN, and its gradient too


class Embedding(nnx.Module):
    """A lookup table whose result has the dtype of the table (`nnx.Embed` fixes its dtype when it is made)."""

    def __init__(self, num_rows: int, dim: int, *, stddev: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(stddev * jax.random.normal(rngs.params(), (num_rows, dim)))  # [V, D]

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        return matmul_transposed(x, self.embedding[...])


def linear(num_in: int, num_out: int, *, stddev: float, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    kernel_init = nnx.initializers.normal(stddev)
    return nnx.Linear(num_in, num_out, use_bias=use_bias, kernel_init=kernel_init, dot_general=dot_general, rngs=rngs)


def choose_attention(dtype: Any) -> Attention:
    """cuDNN's fused attention for 16-bit activations on an NVIDIA GPU; plain XLA elsewhere. Decided while tracing."""
    sixteen_bit = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if sixteen_bit and jax.default_backend() == "gpu" else "plain"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: Attention | None = None) -> jax.Array:
    """Causal attention. q[B, T, H, C], k and v[B, T, K, C] -> [B, T, H, C]; H is a multiple of K.

    `implementation=None` chooses by device and dtype (`choose_attention`); a name insists.
    """
    if (implementation or choose_attention(q.dtype)) == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    # Scores are recomputed in the backward pass: [B, H, T, T] is the largest thing a layer could save.
    return jax.checkpoint(_attend_plain)(q, k, v)


def _attend_plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    batch, length, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], head_dim)
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped, k).astype(jnp.float32) * head_dim**-0.5
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, _MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(q.shape)


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
    """`x`, an array or several, through every layer: a scan over stacked parameters, or a loop over a list of them."""
    if isinstance(layers, list | tuple):
        body = remat.wrap_layer(layer, scanned=False)
        for params in layers:
            x = body(x, params)
        return x
    body = remat.wrap_layer(layer)
    return jax.lax.scan(lambda x, params: (body(x, params), None), x, layers)[0]
