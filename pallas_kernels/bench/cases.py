"""What is timed: one operation at one size of its table, forward and backward, with its least work in bytes and operations."""

import importlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import fused_optimizer, norm
from pallas_kernels import quantize as blockwise
from pallas_kernels.attention import ATTENTION, attention
from pallas_kernels.attention import shapes as attentions
from pallas_kernels.fused_optimizer import ADAMW, LION
from pallas_kernels.fused_optimizer import shapes as leaves_of
from pallas_kernels.linear_cross_entropy import TOTAL, linear_cross_entropy_sum
from pallas_kernels.linear_cross_entropy import shapes as heads
from pallas_kernels.norm import NORM
from pallas_kernels.norm import shapes as rows
from pallas_kernels.quantize import QUANTIZE
from pallas_kernels.quantize import shapes as arrays_of

_SMALLER = 32  # on a CPU every large dim is so many times smaller


class Case(NamedTuple):
    """`run(implementation)` is a function of `make(key)`'s arrays: value and gradients, or what the operation gives.

    rivals: other ways to the same end, by name, as functions of the same arrays; None where a package is missing.
    """

    op: Any
    make: Callable[[jax.Array], tuple[jax.Array, ...]]
    run: Callable[[str], Callable[..., Any]]
    num_bytes: int  # that any implementation must read and write
    flops: int
    rivals: Mapping[str, Callable[..., Any] | None] = MappingProxyType({})


def _quantize(num_rows: int, dim: int, dtype: Any, format: str, *, is_stochastic: bool) -> Case:
    """One read of the array, one write of its codes and scales. A copy of the array is the rival that does nothing."""
    size, num_bytes = num_rows * dim, {"int4": 0.5}.get(format, 1) + 4 / blockwise.BLOCK

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        return (jax.random.normal(key, (num_rows, dim), dtype),)

    def run(implementation: str) -> Callable[..., Any]:
        seed = 1 if is_stochastic else None
        return lambda x: blockwise.quantize(x, format, seed=seed, implementation=implementation)

    traffic = int(size * (jnp.dtype(dtype).itemsize + num_bytes))
    return Case(QUANTIZE, make, run, traffic, 0, {"copy": lambda x: x + 1})


def _optimizer(rule: str, shapes: tuple[tuple[int, ...], ...], moments: Any) -> Case:
    """A whole update, float32 parameters and gradients: both and the moments read, all but gradients written."""
    num_moments, op = {"adamw": (2, ADAMW), "lion": (1, LION)}[rule]

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        draw = lambda index, shape: jax.random.normal(jax.random.fold_in(key, index), shape)
        return tuple(
            draw(number, shape).astype(jnp.float32 if number % 4 < 2 else moments) ** 2
            for index, shape in enumerate(shapes)
            for number in range(4 * index, 4 * index + 2 + num_moments)
        )

    def grouped(arrays: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
        each = 2 + num_moments
        return [arrays[start : start + each] for start in range(0, len(arrays), each)]

    def run(implementation: str) -> Callable[..., Any]:
        def update(*arrays: jax.Array) -> Any:
            leaves = [fused_optimizer.Leaf(p, g, tuple(kept)) for p, g, *kept in grouped(arrays)]
            given = {"rate": 1e-3, "count": 3, "returns": "params", "implementation": implementation}
            return getattr(fused_optimizer, rule)(leaves, **given)

        return update

    size = sum(math.prod(shape) for shape in shapes)
    traffic = size * (12 + 2 * num_moments * jnp.dtype(moments).itemsize)
    return Case(
        op, make, run, traffic, 0, {"optax": _optax(rule, grouped), "copy": lambda *arrays: [one + 1 for one in arrays]}
    )


def _optax(rule: str, grouped: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same update by optax, if it is there: this package imports jax only."""
    try:
        optax = importlib.import_module("optax")
    except ModuleNotFoundError:
        return None
    tx = {"adamw": optax.adamw, "lion": optax.lion}[rule](1e-3)

    def update(*arrays: jax.Array) -> Any:
        params, grads, *moments = (list(each) for each in zip(*grouped(arrays), strict=True))
        first, *rest = tx.init(params)
        kept = dict(zip(("mu", "nu"), moments, strict=False))
        state = (first._replace(count=jnp.full((), 2, jnp.int32), **kept), *rest)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


def _norm(num_rows: int, dim: int, dtype: Any) -> Case:
    """RMSNorm with a residual: forward reads two rows and writes two, backward reads three and writes one."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        x, residual = jax.random.normal(key, (2, num_rows, dim), dtype)
        return x, residual, jnp.ones(dim, dtype)

    def run(implementation: str) -> Callable[..., Any]:
        def both(x: jax.Array, residual: jax.Array, scale: jax.Array) -> Any:
            call = lambda *args: norm.rms_norm(args[0], args[2], residual=args[1], implementation=implementation)
            out, pull = jax.vjp(call, x, residual, scale)
            return out, pull(out)

        return both

    return Case(NORM, make, run, 8 * num_rows * dim * jnp.dtype(dtype).itemsize, 0)


def _head(shape: heads.Shape, dtype: Any) -> Case:
    """The head's sum and its gradients: three products; x, w and their gradients once each."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (shape.batch, shape.length, shape.dim), dtype)
        w = jax.random.normal(keys[1], (shape.dim, shape.padded), dtype) * shape.dim**-0.5
        return x, w, jax.random.randint(keys[2], x.shape[:2], 0, shape.vocab)

    def run(implementation: str) -> Callable[..., Any]:
        total = lambda x, w, t: linear_cross_entropy_sum(x, w, t, vocab_size=shape.vocab, implementation=implementation)
        return jax.value_and_grad(total, (0, 1))

    num_tokens = shape.batch * shape.length
    elements = 2 * shape.dim * (num_tokens + shape.padded)
    return Case(TOTAL, make, run, elements * jnp.dtype(dtype).itemsize, 6 * num_tokens * shape.dim * shape.padded)


def _attention(shape: attentions.Shape, dtype: Any) -> Case:
    """Causal attention and its gradients: two products forward, five backward, of the scores in sight."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        sizes = [(shape.batch, shape.length, num, shape.head_dim) for num in heads]
        return tuple(jax.random.normal(one, size, dtype) for one, size in zip(jax.random.split(key, 3), sizes, strict=True))

    def run(implementation: str) -> Callable[..., Any]:
        options = {"sliding_window": shape.sliding_window, "soft_cap": shape.soft_cap, "implementation": implementation}

        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out, pull = jax.vjp(lambda *parts: attention(*parts, **options), q, k, v)
            return out, pull(out)

        return both

    tokens, window = shape.batch * shape.length, min(shape.sliding_window or shape.length, shape.length)
    seen = tokens * window - shape.batch * window * (window - 1) // 2  # scores of one head
    elements = tokens * shape.head_dim * (5 * shape.num_heads + 6 * shape.num_kv_heads)
    return Case(ATTENTION, make, run, elements * jnp.dtype(dtype).itemsize, 14 * seen * shape.num_heads * shape.head_dim)


def _small(size: int, multiple: int = 1) -> int:
    return max(size // _SMALLER // multiple, 1) * multiple


def cases(*, tiny: bool, dtype: Any) -> dict[tuple[str, str], Case]:
    """(operation, shape) -> case. `tiny`: sizes for a CPU, same arrangement."""
    found: dict[tuple[str, str], Case] = {}
    for name, (num_rows, dim) in rows.SHAPES.items():
        size = (_small(num_rows), _small(dim, 128)) if tiny else (num_rows, dim)
        found["norm", name] = _norm(*size, dtype)
    for name, shape in attentions.SHAPES.items():
        short = shape._replace(batch=1, length=_small(shape.length), head_dim=_small(shape.head_dim, 8))
        window = shape.sliding_window and _small(shape.sliding_window)
        found["attention", name] = _attention(short._replace(sliding_window=window) if tiny else shape, dtype)
    for name, shape in heads.SHAPES.items():
        vocab = _small(shape.vocab)
        small = heads.Shape(1, _small(shape.length), _small(shape.dim), vocab, vocab + (shape.padded > shape.vocab), shape.tied)
        found["linear_cross_entropy_sum", name] = _head(small if tiny else shape, dtype)
    for name, (num_rows, dim) in arrays_of.SHAPES.items():
        size = (_small(num_rows), _small(dim, blockwise.BLOCK)) if tiny else (num_rows, dim)
        for format, is_stochastic in (("int8", False), ("int8", True), ("int4", False), ("float8_e4m3", False)):
            said = f"{name} {format}{' stochastic' * is_stochastic}"
            found["quantize", said] = _quantize(*size, dtype, format, is_stochastic=is_stochastic)
    for name, shapes in leaves_of.SHAPES.items():
        small = tuple(tuple(_small(length, 8) for length in shape) for shape in shapes[:8]) if tiny else shapes
        for rule in ("adamw", "lion"):
            found[f"fused_{rule}", name] = _optimizer(rule, small, jnp.float32)
    return found
