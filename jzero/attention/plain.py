"""Attention on whole sequences, by whichever implementation `pallas_kernels.attention` chooses.

Shapes: B batch, T length, H heads, K key-value heads, C head dim.
"""

from typing import Any, Literal

import jax

import pallas_kernels
from pallas_kernels.attention import ATTENTION
from pallas_kernels.dispatch import Call

Attention = Literal["cudnn", "splash", "plain", "chunked"]
NEVER_SPLIT = "splash"  # the others' operations, or cuDNN's own rule, tell XLA's partitioner how


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = True, segment_ids: jax.Array | None = None,
    implementation: Attention | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention. q[B, T, H, C], k and v[B, T, K, C], segment_ids[B, T] -> [B, T, H, C]; H is a multiple of K.

    `implementation=None` chooses by device, shape and dtype (`pallas_kernels.attention`); a name insists.
    """
    return pallas_kernels.attention(q, k, v, causal=causal, segment_ids=segment_ids, implementation=implementation)


def choose_attention(q: Any, k: Any, *, device_kind: str) -> str:
    """The name of what causal attention of arrays like these (shapes suffice), one device's, takes on such a device."""
    options = {"causal": True, "sliding_window": None, "soft_cap": None, "return_lse": False}
    return ATTENTION.choose(Call(device_kind, (q, k, k), options, is_local=True))[0].name
