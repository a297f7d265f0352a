"""Softmax attention: the best of what there is for a device, or blocks of it where the scores would not fit."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._errors import explain, short
from pallas_kernels.attention import chunked, cudnn, reference, splash
from pallas_kernels.dispatch import Call, Implementation, Op

LARGE_BYTES = 4 * 2**30  # of one example's float32 scores: from there on they are made block by block


def _large(call: Call) -> str | None:
    """From one example, not from the batch: jzero compares a program at two batch sizes, and they must be the same program."""
    q, k = call.arrays[:2]
    num_bytes = 4 * q.shape[1] * q.shape[2] * k.shape[1]
    return f"one example's scores take {num_bytes / 1e6:,.0f} MB" if num_bytes > LARGE_BYTES else None


def _unless_chunked(supports: Callable[[Call], str | None]) -> Callable[[Call], str | None]:
    """`chunk` says something of one implementation only."""
    return lambda call: "chunk= is of 'chunked'" if "chunk" in call.options else supports(call)


ATTENTION = Op(
    "attention",
    [
        Implementation("cudnn", cudnn.attend, _unless_chunked(cudnn.why_not)),
        Implementation("splash", splash.attend, _unless_chunked(splash.why_not), platform="tpu"),
        Implementation("plain", reference.attend, _unless_chunked(lambda call: None), loses=_large),
        Implementation("chunked", chunked.attend),
    ],
    reference="plain",
)
IMPLEMENTATIONS = tuple(ATTENTION.table)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = True, segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None, sliding_window: int | None = None, soft_cap: float | None = None,
    scale: float | None = None, return_lse: bool = False, chunk: int | None = None, implementation: str | None = None,
) -> Any:  # fmt: skip
    """softmax(scale q k^T) v over the keys that each query sees; the softmax in float32 (float64 stays).

    | | causal, grouped queries | sliding window | segment ids | soft cap | log-sum-exp |
    |---|---|---|---|---|---|
    | "cudnn": NVIDIA, 16 bits, head dims that 8 divides up to 256 | yes | if causal | one per place, even lengths | no | no |
    | "splash": TPU, bfloat16 or float32, lengths that 128 divides | yes | yes | one per place | yes | no |
    | "plain": all scores in memory, made again for the backward pass | yes | yes | yes | yes | yes |
    | "chunked": 512 x 512 scores at a time | yes | yes | yes | yes | yes |

    Chosen in this order: "plain" only up to 4 GiB of scores per example, "splash" only once it has run on such a TPU. Under
    `shard_map` all arrays are one device's, and nothing is gathered. Under Auto axes "splash" is not there, and the
    partitioner splits the others over batch and heads.

    Args:
      q: [B, T, H, C].
      k, v: [B, S, K, C] of q's dtype; K divides H. S is T where attention is causal or has a window.
      causal: queries see no later keys.
      segment_ids: int[B, T]; queries see only keys of their own segment.
      kv_segment_ids: int[B, S], of the keys; None: as `segment_ids`. A query that sees no key gets 0 and passes no gradient on.
      sliding_window: queries see only keys less than that many places away, their own included.
      soft_cap: scores s become soft_cap tanh(s / soft_cap), before the mask.
      scale: None is C ** -0.5.
      return_lse: also the logarithm of the softmax's divisors, float32[B, T, H] (-inf where a query sees no key), so that
        results over parts of the keys can be put together; it has a gradient.
      chunk: length of a block of "chunked"; None is 512.
      implementation: a name insists.

    Returns:
      [B, T, H, C] of q's dtype, or that and the log-sum-exp.

    Raises:
      ValueError: shapes that disagree, an unknown implementation.
      NotImplementedError: a named implementation that cannot do this, with what it can.

    Example:
      >>> q, k = jnp.ones((1, 6, 4, 8)), jnp.ones((1, 6, 2, 8))
      >>> attention(q, k, k, sliding_window=3).shape
      (1, 6, 4, 8)

    References:
      Rabe, Staats: Self-attention Does Not Need O(n^2) Memory, 2021. Dao: FlashAttention-2, 2023.
    """
    segments = [ids for ids in (segment_ids, kv_segment_ids) if ids is not None]
    options = {"causal": causal, "sliding_window": sliding_window, "soft_cap": soft_cap, "return_lse": return_lse}
    options |= {} if chunk is None else {"chunk": chunk}
    _check(q, k, v, segment_ids, kv_segment_ids, options)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return ATTENTION(q, k, v, *segments, implementation=implementation, scale=scale, **options)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, of_queries: Any, of_keys: Any, options: dict[str, Any]) -> None:
    """Shapes that fit together, and options that mean something."""
    problems = []
    if any(part.ndim != 4 for part in (q, k, v)) or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        problems.append(f"q[B, T, H, C], k and v[B, S, K, C] are {short(q)}, {short(k)}, {short(v)}")
    elif not k.shape[2] or q.shape[2] % k.shape[2]:
        problems.append(f"K={k.shape[2]} key-value heads do not divide H={q.shape[2]}")
    elif q.shape[1] != k.shape[1] and (options["causal"] or options["sliding_window"] is not None):
        problems.append(f"causal or with a window, T={q.shape[1]} queries need as many keys, not S={k.shape[1]}")
    if len({part.dtype for part in (q, k, v)}) > 1:
        problems.append(f"q, k and v have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    for name, ids, shape in (("segment_ids", of_queries, q.shape[:2]), ("kv_segment_ids", of_keys, k.shape[:2])):
        if ids is not None and (ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer)):
            problems.append(f"{name} must be integers of shape {list(shape)}, got {short(ids)}")
    if of_queries is None and of_keys is not None:
        problems.append("kv_segment_ids without segment_ids")
    if of_queries is not None and of_keys is None and q.shape[1] != k.shape[1]:
        problems.append(f"segment_ids[B, T={q.shape[1]}] say nothing of S={k.shape[1]} keys without kv_segment_ids")
    for name in ("sliding_window", "chunk"):
        if options.get(name) is not None and options[name] < 1:
            problems.append(f"{name}={options[name]} must be at least 1")
    if options["soft_cap"] is not None and options["soft_cap"] <= 0:
        problems.append(f"soft_cap={options['soft_cap']} must be more than 0")
    if problems:
        fix = "Reshape to [batch, length, heads, head_dim]; softmax is in float32 by itself, so cast q, k and v alike."
        context = f"causal={options['causal']}, sliding_window={options['sliding_window']}"
        raise ValueError(
            explain("pallas_kernels.attention", "arrays do not fit together", found=problems, context=context, fix=fix)
        )
