"""The TPU kernel that JAX ships, splash attention: blocks that no query sees are never visited, no scores in memory.

It cannot be partitioned: under Auto axes the compiler refuses it, so it is only for arrays that are one device's.
"""

from functools import partial
from typing import Any

import jax

from pallas_kernels.dispatch import Call

_LANES = 128
_BLOCKS = (512, 256, 128)  # the largest that divides the lengths; MaxText's default is 512 for every block


def why_not(call: Call) -> str | None:
    """Why it cannot, or None."""
    (q, k, *rest), options = call.arrays, call.options
    if str(q.dtype) not in ("bfloat16", "float32"):
        return f"bfloat16 and float32 only, not {q.dtype}"
    if q.shape[1] % _LANES or k.shape[1] % _LANES:
        return f"lengths are multiples of {_LANES}, not {q.shape[1]} and {k.shape[1]}"
    if options["return_lse"]:
        return "its log-sum-exp has no gradient"
    if len(rest) > 2:
        return "its rows without a key are not 0"
    if call.auto_axes or not call.is_local:
        over = f" over {', '.join(call.auto_axes)}" if call.auto_axes else ""
        return f"the compiler cannot split it{over}: it is for arrays of one device, inside shard_map"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array, causal: bool, sliding_window: int | None,
    soft_cap: float | None, scale: float, return_lse: bool, interpret: bool,
) -> jax.Array:  # fmt: skip
    """As `reference.attend`; the scale goes into q."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    lengths = q.shape[1], k.shape[1]
    kernel = splash.make_splash_mha(
        _mask(lengths, q.shape[2], causal, sliding_window), block_sizes=_block_sizes(splash, lengths), head_shards=1,
        q_seq_shards=1, attn_logits_soft_cap=soft_cap, interpret=interpret,
    )  # fmt: skip
    q, k, v = ((part * scale if part is q else part).swapaxes(1, 2) for part in (q, k, v))
    run = partial(_one_example, kernel, splash.SegmentIds)
    return jax.vmap(run)(q.astype(k.dtype), k, v, *segments).swapaxes(1, 2)


def _one_example(kernel: Any, ids_of: Any, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
    ids = ids_of(segments[0], segments[-1]) if segments else None
    return kernel(q, k, v, segment_ids=ids)


def _mask(lengths: tuple[int, int], num_heads: int, causal: bool, sliding_window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if sliding_window is not None:
        one = masks.LocalMask(lengths, (sliding_window - 1, 0 if causal else sliding_window - 1), 0)
    else:
        one = masks.CausalMask(lengths) if causal else masks.FullMask(lengths)
    return masks.MultiHeadMask([one] * num_heads)


def _block_sizes(splash: Any, lengths: tuple[int, int]) -> Any:
    of_queries, of_keys = (next(size for size in _BLOCKS if not length % size) for length in lengths)
    return splash.BlockSizes(
        block_q=of_queries, block_kv=of_keys, block_kv_compute=of_keys, block_q_dkv=of_queries, block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys, block_q_dq=of_queries, block_kv_dq=of_keys,
    )  # fmt: skip
