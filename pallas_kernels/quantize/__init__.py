"""Arrays in 8 or 4 bits with a scale for each block: for compressed collectives, moments and offload traffic."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, rounding
from pallas_kernels._errors import explain, short, suggest
from pallas_kernels.dispatch import Call, Implementation, Op
from pallas_kernels.quantize import gpu, reference, tpu
from pallas_kernels.quantize.cut import num_blocks
from pallas_kernels.quantize.formats import FORMATS

BLOCK = 256  # as bitsandbytes: 4 bytes of scale are 1.6% of a block of bytes


def _fits(call: Call) -> str | None:
    """Blocks of whole rows, along the last dim."""
    first, given = call.arrays[0], call.options
    if given["dim"] != first.ndim - 1:
        return f"blocks must run along the last dim, these run along dim {given['dim']} of {first.ndim}"
    form, block = FORMATS[given["format"]], given["block"]
    size = given.get("size", first.shape[-1])
    dtypes = [array.dtype for array in call.arrays if array.dtype != jnp.uint32]
    dtypes += [given["dtype"]] if "dtype" in given else []
    return blocks.why_not(block, block // form.pieces, size, dtypes)


QUANTIZE = Op(
    "quantize",
    [
        Implementation("mosaic_gpu", gpu.quantize, _fits, platform="gpu"),
        Implementation("mosaic_tpu", tpu.quantize, _fits, platform="tpu"),
        Implementation("reference", reference.quantize),
    ],
)
DEQUANTIZE = Op(
    "dequantize",
    [
        Implementation("mosaic_gpu", gpu.dequantize, _fits, platform="gpu"),
        Implementation("mosaic_tpu", tpu.dequantize, _fits, platform="tpu"),
        Implementation("reference", reference.dequantize),
    ],
)


def quantize(
    x: jax.Array, format: str = "int8", *, block: int = BLOCK, dim: int = -1, seed: Any = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Codes and scales of x in blocks: scale = max |x| / top, code = round(x / scale); what they stand for is code times scale.

    format          top     stored as            |x - value| at most, m the block's largest |x|
    int8            127     int8                 m / 254
    int4            7       uint8, two a byte    m / 14
    float8_e4m3     448     float8_e4m3fn        |x| / 16, and m / 448 / 2^10 near zero
    float8_e5m2     57344   float8_e5m2          |x| / 8, and m / 57344 / 2^17 near zero
    dynamic         1       uint8                see `dynamic_map`; with "dynamic_unsigned" for what is never negative

    plus float32's rounding. With a seed codes are rounded up or down with probability by distance: twice the bound, and the mean
    of value is x. Arithmetic is float32's (float64 stays, but for the codes of floats). The noise depends on the seed and on the
    element's place modulo 2^32, on nothing else: every implementation, tiling and mesh has the same.

    A block of zeros, and one whose largest magnitude is below 2^-100, has scale 0. A block with an infinity or NaN has scale NaN and
    codes 0: all of it becomes NaN again, so an overflow is seen by whoever looks for one. There is no derivative.

    Two codes of 4 bits share a byte, one from each half of a block. `jnp.int4` was not taken: on the host, in files and in numpy it
    is a byte for each number, which is what 4 bits are to avoid.

    Args:
      x: [..., D, ...], float32, bfloat16, float16 or float64.
      block: elements of a block along `dim`; the last one may be shorter. Even for int4.
      dim: blocks run along it. Where x is split over devices along other dims, nothing travels.
      seed: None rounds to nearest, ties to even; an integer, or uint32[] made by the program.
      implementation: "reference" (XLA), "mosaic_gpu" or "mosaic_tpu" (blocks of 128 to 2,048 that divide the last dim).

    Returns:
      codes of x's shape (int4: whole blocks of half as many bytes along `dim`), float32 scales [..., ceil(D / block), ...].

    Raises:
      ValueError: a format that is not known or cannot round stochastically, a block or dim that fits nothing.
      TypeError: x is not floating.
      NotImplementedError: a named kernel that does not run here; a derivative.

    Example:
      >>> codes, scales = quantize(jnp.array([0.5, -1.0, 127.0, 0.0]))
      >>> print(codes, scales)
      [  0  -1 127   0] [1.]

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, 2022. Micikevicius et al.: FP8 Formats for
      Deep Learning, 2022. Gupta et al.: Deep Learning with Limited Numerical Precision, 2015 (stochastic rounding).
    """
    return _quantize("quantize", x, None, format, block, dim, seed, implementation)


def quantize_with_feedback(
    x: jax.Array, error: jax.Array, format: str = "int8", *, block: int = BLOCK, dim: int = -1, seed: Any = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`quantize` of x + error, and what the codes leave out: the error to add next time, so that nothing is lost for good.

    Args:
      error: of x's shape and any float dtype, which the new one has too: zeros at first.

    Returns:
      codes, scales, new error = (x + error) - value. Where a block is not finite the error stays what it was.

    Example:
      >>> codes, scales, error = quantize_with_feedback(jnp.array([0.5, 127.0]), jnp.zeros(2))
      >>> print(codes, error)
      [  0 127] [0.5 0. ]

    References:
      Seide et al.: 1-Bit Stochastic Gradient Descent, 2014. Karimireddy et al.: Error Feedback Fixes SignSGD, 2019.
    """
    return _quantize("quantize_with_feedback", x, error, format, block, dim, seed, implementation)


def dequantize(
    codes: jax.Array, scales: jax.Array, format: str = "int8", *, block: int = BLOCK, dim: int = -1, size: int | None = None,
    dtype: Any = jnp.float32, implementation: str | None = None,
) -> jax.Array:  # fmt: skip
    """code times scale, in float32, then `dtype`: what `quantize` with the same format, block and dim made.

    Args:
      size: of `dim`; needed for int4 where it is not whole blocks.

    Raises:
      ValueError: codes and scales that do not belong together.
      TypeError: codes of another format.

    Example:
      >>> print(dequantize(*quantize(jnp.array([1.0, -7.0, 3.0, 0.0]), "int4"), "int4", size=4))
      [ 1. -7.  3.  0.]
    """
    who = "dequantize"
    form = _form(who, format, codes, stochastic=False)
    dim = _dim(who, codes, dim)
    size = size if size is not None else codes.shape[dim] * form.pieces
    own = _block(block, size, form.pieces)
    number = num_blocks(size, own)
    wanted = number * own // 2 if form.pieces == 2 else size
    shape = tuple(number if one == dim else length for one, length in enumerate(codes.shape))
    problems = (
        [] if codes.dtype == form.dtype else [f"codes {short(codes)}, {format} is stored as {jnp.dtype(form.dtype).name}"]
    )
    if problems:
        fix = "Name the format that the codes were made with."
        raise TypeError(explain(f"pallas_kernels.{who}", "codes of another format", found=problems, fix=fix))
    if codes.shape[dim] != wanted or scales.shape != shape:
        found = [
            f"codes {short(codes)}, scales {short(scales)}",
            f"scales must be {list(shape)}, {wanted} codes along dim {dim}",
        ]
        fix = "Pass the block, dim and size that they were made with."
        context = f"{format}, block={block}, dim={dim}, size={size}"
        raise ValueError(
            explain(f"pallas_kernels.{who}", "codes and scales do not belong together", found=found, context=context, fix=fix)
        )
    raw = codes if form.stored == form.dtype else jax.lax.bitcast_convert_type(codes, form.stored)
    options = {"format": format, "block": own, "dim": dim, "size": size, "dtype": jnp.dtype(dtype)}
    return DEQUANTIZE(raw, _no_derivative(scales), implementation=implementation, **options)


def _quantize(
    who: str, x: jax.Array, error: jax.Array | None, format: str, block: int, dim: int, seed: Any, implementation: str | None
) -> Any:
    form = _form(who, format, x, stochastic=seed is not None)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = "Integers are as small as they are; convert them first."
        raise TypeError(explain(f"pallas_kernels.{who}", "x must be floating", found=[f"x {short(x)}"], fix=fix))
    dim = _dim(who, x, dim)
    if error is not None and (error.shape != x.shape or not jnp.issubdtype(error.dtype, jnp.floating)):
        fix = "Start from jnp.zeros_like(x)."
        found = [f"error {short(error)}"]
        raise ValueError(explain(f"pallas_kernels.{who}", "shapes disagree", found=found, context=f"x {short(x)}", fix=fix))
    if block < 1 or (form.pieces == 2 and block % 2):
        fix = "256 is a good size; int4 puts the halves of a block together, so it must be even."
        raise ValueError(
            explain(
                f"pallas_kernels.{who}", "no such block", found=[f"block={block}"], context=f"x {short(x)}, {format}", fix=fix
            )
        )
    arrays = [_no_derivative(array) for array in (x, error) if array is not None]
    arrays += [rounding.fold(seed)] if seed is not None else []
    options = {"format": format, "block": _block(block, x.shape[dim], form.pieces), "dim": dim}
    options |= {"is_stochastic": seed is not None, "has_error": error is not None}
    codes, *more = QUANTIZE(*arrays, implementation=implementation, **options)
    return codes if form.stored == form.dtype else jax.lax.bitcast_convert_type(codes, form.dtype), *more


def _block(block: int, size: int, pieces: int) -> int:
    """A row shorter than a block is one block."""
    return min(block, -(-size // pieces) * pieces)


def _form(who: str, format: str, array: jax.Array, *, stochastic: bool) -> Any:
    if format not in FORMATS:
        found, fix = [f"format={format!r}"], "Name one of them."
        context = suggest(format, FORMATS)
        raise ValueError(explain(f"pallas_kernels.{who}", "no such format", found=found, context=context, fix=fix))
    if stochastic and not FORMATS[format].can_round:
        found, fix = [f"format={format!r} with a seed"], "Its values are unevenly spaced: leave the seed out."
        raise ValueError(
            explain(f"pallas_kernels.{who}", "rounds to nearest only", found=found, context=f"x {short(array)}", fix=fix)
        )
    return FORMATS[format]


def _dim(who: str, array: jax.Array, dim: int) -> int:
    if array.ndim and -array.ndim <= dim < array.ndim and math.prod(array.shape):
        return dim % array.ndim
    found, fix = [f"dim={dim} of {short(array)}"], "Blocks run along a dim of an array that has elements."
    raise ValueError(explain(f"pallas_kernels.{who}", "no such dim", found=found, fix=fix))


@jax.custom_jvp
def _no_derivative(array: jax.Array) -> jax.Array:
    return array


@_no_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    found = [f"derivative with respect to {short(primals[0])}"]
    fix = (
        "Pass jax.lax.stop_gradient of it, or write the estimate that is meant (straight through, say) as a custom derivative."
    )
    raise NotImplementedError(
        explain(
            "pallas_kernels.quantize", "rounding has no derivative", found=found, context="it is 0 almost everywhere", fix=fix
        )
    )
