"""RMSNorm and LayerNorm with the residual added in the same pass."""

from typing import Any

import jax

from pallas_kernels._errors import explain, short
from pallas_kernels.dispatch import Call, Implementation, Op
from pallas_kernels.norm import gpu, reference, tpu
from pallas_kernels.rows import why_not

IN_REGISTERS = 4096  # of 255 a thread, rows of 8,192 take all and spill (benchmarks/kernel_resources.py)


def _fits(call: Call) -> str | None:
    return why_not(call.arrays[0].shape[-1], call.arrays)


def _fits_gpu(call: Call) -> str | None:
    return why_not(call.arrays[0].shape[-1], call.arrays, most=IN_REGISTERS)


NORM = Op(
    "norm",
    [
        Implementation("mosaic_gpu", gpu.norm, _fits_gpu, platform="gpu"),
        Implementation("mosaic_tpu", tpu.norm, _fits, platform="tpu"),
        Implementation("reference", reference.norm),
    ],
)


def rms_norm(
    x: jax.Array, scale: jax.Array, *, residual: jax.Array | None = None, eps: float = 1e-5, implementation: str | None = None
) -> Any:
    """y = h rsqrt(mean(h^2) + eps) scale along the last dim, with h = x + residual; computed in float32, stored in x's dtype.

    Args:
      x: [..., D].
      scale: [D], any float dtype.
      residual: [..., D]; given, the result is (y, h).
      implementation: "reference" (XLA fuses it), "mosaic_gpu" or "mosaic_tpu" (D a multiple of 128, on GPUs up to 4,096).

    Returns:
      y[..., D], or (y, h) with a residual.

    Raises:
      ValueError: shapes that disagree, an unknown implementation.
      NotImplementedError: a named kernel that does not run here.

    Example:
      >>> import jax.numpy as jnp
      >>> print(rms_norm(jnp.array([3.0, -4.0]), jnp.ones(2), eps=0.0))
      [ 0.84852815 -1.1313709 ]

    References:
      Zhang, Sennrich: Root Mean Square Layer Normalization, 2019.
    """
    return _norm("rms_norm", x, residual, scale, None, centred=False, eps=eps, implementation=implementation)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, residual: jax.Array | None = None, eps: float = 1e-5,
    implementation: str | None = None,
) -> Any:  # fmt: skip
    """y = (h - mean(h)) rsqrt(var(h) + eps) scale + bias along the last dim, with h = x + residual; as `rms_norm` otherwise.

    References:
      Ba, Kiros, Hinton: Layer Normalization, 2016.
    """
    return _norm("layer_norm", x, residual, scale, bias, centred=True, eps=eps, implementation=implementation)


def _norm(
    who: str, x: jax.Array, residual: jax.Array | None, scale: jax.Array, bias: jax.Array | None, *, centred: bool, eps: float,
    implementation: str | None,
) -> Any:  # fmt: skip
    wrong = [f"{name} {short(array)}" for name, array in (("scale", scale), ("bias", bias)) if not _is(array, x.shape[-1:])]
    wrong += [] if _is(residual, x.shape) else [f"residual {short(residual)}"]
    if wrong:
        fix = "scale and bias are [D], a residual has x's shape."
        raise ValueError(explain(f"pallas_kernels.{who}", "shapes disagree", found=wrong, context=f"x {short(x)}", fix=fix))
    arrays = [array for array in (x, residual, scale, bias) if array is not None]
    options = {"has_residual": residual is not None, "has_bias": bias is not None, "centred": centred, "eps": eps}
    y, h = NORM(*arrays, implementation=implementation, **options)
    return y if residual is None else (y, h)


def _is(array: jax.Array | None, shape: tuple[int, ...]) -> bool:
    return array is None or array.shape == shape
