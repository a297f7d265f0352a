"""What is timed: one operation at one size of its table, forward and backward, with its least work in bytes and operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import norm
from pallas_kernels.attention import ATTENTION, attention
from pallas_kernels.attention import shapes as attentions
from pallas_kernels.linear_cross_entropy import TOTAL, linear_cross_entropy_sum
from pallas_kernels.linear_cross_entropy import shapes as heads
from pallas_kernels.norm import NORM
from pallas_kernels.norm import shapes as rows

_SMALLER = 32  # on a CPU every large dim is so many times smaller


class Case(NamedTuple):
    """`run(implementation)` is a function of `make(key)`'s arrays: value and gradients."""

    op: Any
    make: Callable[[jax.Array], tuple[jax.Array, ...]]
    run: Callable[[str], Callable[..., Any]]
    num_bytes: int  # that any implementation must read and write
    flops: int


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
    return found
