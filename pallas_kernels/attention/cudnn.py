"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: no scores in memory. Not a kernel of this package.

JAX asks the GPU of the machine that traces which cuDNN it has and what it can do, so a program that is compiled for a GPU that
is not there cannot have it (jax 0.11.2): it gets another implementation, and its record says so.
"""

import jax

from pallas_kernels.attention.masks import same_segment
from pallas_kernels.dispatch import Call

_DTYPES = ("bfloat16", "float16")
_MOST_HEAD_DIM = 256  # from Hopper on, 128 before: `check_is_flash_attention` of jax/_src/cudnn/fused_attention_stablehlo.py


def why_not(call: Call) -> str | None:
    """Why it cannot, or None."""
    (q, k, *rest), options = call.arrays, call.options
    segments = rest[1:]
    if not call.is_gpu:
        return f"it runs on a GPU, and this is for {call.device_kind}"
    if str(q.dtype) not in _DTYPES:
        return f"{' and '.join(_DTYPES)} only, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _MOST_HEAD_DIM:
        return f"head dims are multiples of 8 up to {_MOST_HEAD_DIM}, not {q.shape[-1]}"
    if options["soft_cap"] is not None:
        return "it has no soft cap"
    if options["return_lse"]:
        return "its log-sum-exp has no gradient"
    if options["sliding_window"] is not None and not options["causal"]:
        return "it has a sliding window only where attention is causal"
    if len(segments) > 1:
        return "its rows without a key are not 0"
    if segments and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"with segment ids lengths are even, not {q.shape[1]} and {k.shape[1]}"
    if call.is_nested:  # in a loop or a jit; jax 0.11.2, H100
        return "in a shard_map inside another its partitioner ends the compiler's process"
    if call.is_local and call.auto_axes:
        return f"its partitioner fails over {', '.join(call.auto_axes)} where other axes are manual"  # jax 0.11.2
    if jax.default_backend() != "gpu":
        return "no GPU here: jax asks it for its cuDNN while tracing"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array, causal: bool, sliding_window: int | None,
    soft_cap: float | None, scale: float, return_lse: bool,
) -> jax.Array:  # fmt: skip
    """As `reference.attend`. Segments become a mask of B T S elements in the operands' dtype, which cuDNN adds."""
    mask = same_segment(segments[0], segments[-1])[:, None] if segments else None
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, local_window_size=window, scale=scale, implementation="cudnn"
    )
