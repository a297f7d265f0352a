"""Both norms forward and backward as one pass over rows each; the kernels of both devices run these bodies.

Backward, with g = dy scale and n = the normalised row: dh = r (g - mean(g) - n mean(g n)) + dh_out, mean(g) only if centred;
dscale = sum over rows of dy n, dbias of dy. The row's statistics are computed again: they cost no traffic.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm.reference import named
from pallas_kernels.rows import Along, Pass

Run = Callable[..., list[jax.Array]]  # rows.tpu.run or rows.gpu.run


def _wide(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32)


def _normalised(along: Along, h: jax.Array, centred: bool, eps: float) -> tuple[jax.Array, jax.Array]:
    """The normalised row, and what its deviations were multiplied by."""
    dim = h.shape[-1]
    off = h - along.total(h) * (1 / dim) if centred else h
    scale = jax.lax.rsqrt(along.total(off * off) * (1 / dim) + eps)
    return off * scale, scale


def _forward(centred: bool, eps: float, along: Along, rows: Sequence[Any], shared: Sequence[Any], place: Any) -> Any:
    x, *residual = rows
    h = (_wide(x) + _wide(residual[0])).astype(x.dtype) if residual else x
    y = _normalised(along, _wide(h), centred, eps)[0] * _wide(shared[0])
    y = y + _wide(shared[1]) if len(shared) > 1 else y
    return ((y, h) if residual else (y,)), ()


def _backward(centred: bool, eps: float, along: Along, rows: Sequence[Any], shared: Sequence[Any], place: Any) -> Any:
    h, dy, dh = map(_wide, rows)
    dim = h.shape[-1]
    normal, scale = _normalised(along, h, centred, eps)
    g = dy * _wide(shared[0])
    back = g - normal * (along.total(g * normal) * (1 / dim))
    back = back - along.total(g) * (1 / dim) if centred else back
    return (back * scale + dh,), (dy * normal, dy)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(run: Run, options: tuple[tuple[str, Any], ...], *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    has = dict(options)
    x, residual, scale, bias = named(arrays, has["has_residual"], has["has_bias"])
    rows = [_flat(array) for array in (x, residual) if array is not None]
    one = Pass(partial(_forward, has["centred"], has["eps"]), [x.dtype] * len(rows))
    y, *h = run(one, rows, [scale] if bias is None else [scale, bias])
    return y.reshape(x.shape), h[0].reshape(x.shape) if h else x


def _norm_forward(run: Run, options: tuple[tuple[str, Any], ...], *arrays: jax.Array) -> Any:
    y, h = _norm(run, options, *arrays)
    return (y, h), (h, *arrays[2 if dict(options)["has_residual"] else 1 :])


def _norm_backward(run: Run, options: tuple[tuple[str, Any], ...], saved: Any, cotangents: Any) -> Any:
    has, (h, scale, *bias), (dy, dh) = dict(options), saved, cotangents
    one = Pass(partial(_backward, has["centred"], has["eps"]), [h.dtype], num_sums=2)
    dx, dscale, dbias = run(one, [_flat(array) for array in (h, dy, dh)], [scale])
    dx = dx.reshape(h.shape)
    of_params = [dscale.astype(scale.dtype), *[dbias.astype(one.dtype) for one in bias]]
    return (dx, dx, *of_params) if has["has_residual"] else (dx, *of_params)


_norm.defvjp(_norm_forward, _norm_backward)


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


def norm(run: Run, *arrays: jax.Array, interpret: bool, **options: Any) -> tuple[jax.Array, jax.Array]:
    """(y, h) by the kernel that `run` makes."""
    return _norm(partial(run, interpret=interpret), tuple(sorted(options.items())), *arrays)
