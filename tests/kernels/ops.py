"""The law table of pallas_kernels: a row is an operation on a small twin of a real shape; laws walk rows x implementations.

Inputs are drawn anew each run in float64 and rounded to the dtype under test; what is compared with is the reference on those
rounded inputs in float64, and what is allowed is one and a half times what the reference itself loses in that dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.random import Generator

import pallas_kernels
from pallas_kernels import fused_optimizer, norm, quantize
from pallas_kernels.attention import ATTENTION
from pallas_kernels.attention import shapes as attention_shapes
from pallas_kernels.fused_optimizer import ADAMW, LION
from pallas_kernels.fused_optimizer import shapes as leaf_shapes
from pallas_kernels.linear_cross_entropy import LOSSES, TOTAL, shapes
from pallas_kernels.norm import NORM
from pallas_kernels.norm import shapes as norm_shapes
from pallas_kernels.quantize import DEQUANTIZE, QUANTIZE
from pallas_kernels.quantize import shapes as block_shapes

DTYPES = ("float32", "bfloat16")


class Row(NamedTuple):
    """`call(arrays, implementation)` gives what is compared, gradients of float arrays included where there are any."""

    op: Any
    make: Callable[[Generator], dict[str, np.ndarray]]
    call: Callable[..., Any]  # (implementation, **arrays) -> arrays
    is_differentiable: bool = True


def heads(name: str, **options: Any) -> dict[str, Row]:
    """Both forms of the head on a twin of one shape."""
    twin = shapes.SHAPES[name].twin()

    def make(random: Generator) -> dict[str, np.ndarray]:
        table = random.normal(size=(twin.padded, twin.dim)) * 2
        return {
            "x": random.normal(size=(twin.batch, twin.length, twin.dim)), "w": table if twin.tied else table.T,
            "targets": random.integers(0, twin.vocab, (twin.batch, twin.length)),
            "weights": random.normal(size=(twin.batch, twin.length)),
        }  # fmt: skip

    given = {"vocab_dim": 0 if twin.tied else 1, "vocab_size": twin.vocab, **options}

    def losses(implementation: str, x: Any, w: Any, targets: Any, weights: Any) -> Any:
        found = pallas_kernels.linear_cross_entropy(x, w, targets, implementation=implementation, num_chunks=5, **given)
        return found * jnp.sin(weights)

    def total(implementation: str, x: Any, w: Any, targets: Any, weights: Any) -> Any:
        more = {} if implementation == "fused" else {"num_chunks": 5}
        return pallas_kernels.linear_cross_entropy_sum(x, w, targets, weights, implementation=implementation, **given, **more)

    said = ",".join(f"{key}={value}" for key, value in options.items())
    return {f"losses {name} {said}": Row(LOSSES, make, losses), f"sum {name} {said}": Row(TOTAL, make, total)}


def norms(name: str, *, centred: bool, has_residual: bool) -> dict[str, Row]:
    num_rows, dim = norm_shapes.TWINS[name]

    def make(random: Generator) -> dict[str, np.ndarray]:
        rows = {key: random.normal(size=(num_rows, dim)) + 0.3 for key in ("x", *["residual"] * has_residual)}
        return {**rows, **{key: random.normal(size=dim) for key in ("scale", *["bias"] * centred)}}

    def call(implementation: str, **arrays: Any) -> Any:
        return (norm.layer_norm if centred else norm.rms_norm)(**arrays, implementation=implementation)

    said = f"{'layer' if centred else 'rms'} norm {name}{' + residual' * has_residual}"
    return {said: Row(NORM, make, call)}


def quantizers(name: str, format: str, *, seed: int | None = None) -> dict[str, Row]:
    """Values after both ways, scales and what is left over; and the way back alone."""
    shape = block_shapes.TWINS[name]

    def make(random: Generator) -> dict[str, np.ndarray]:
        x, error = random.normal(size=(2, *shape)) * [[[3.0]], [[0.1]]]
        return {"x": np.abs(x) if format == "dynamic_unsigned" else x, "error": np.abs(error)}

    def there(implementation: str, x: Any, error: Any) -> Any:
        codes, scales, left = quantize.quantize_with_feedback(x, error, format, seed=seed, implementation=implementation)
        back = quantize.dequantize(codes, scales, format, size=shape[-1], dtype=scales.dtype, implementation="reference")
        return back, scales, left

    def back(implementation: str, x: Any, error: Any) -> Any:
        codes, scales = quantize.quantize(x, format, implementation="reference")
        return quantize.dequantize(codes, scales, format, size=shape[-1], dtype=x.dtype, implementation=implementation)

    said = f"{format} {name}{f' seed={seed}' * (seed is not None)}"
    rows = {f"quantize {said}": Row(QUANTIZE, make, there, False)}
    return rows if seed is not None else {**rows, f"dequantize {said}": Row(DEQUANTIZE, make, back, False)}


def optimizers(rule: str, name: str, *, returns: str = "updates") -> dict[str, Row]:
    """Leaves of one twin, moments in the dtype under test, the gradient scaled."""
    twin, op = leaf_shapes.TWINS[name], {"adamw": ADAMW, "lion": LION}[rule]
    names = ("param", "grad", "first", "second")[: 4 if rule == "adamw" else 3]

    def make(random: Generator) -> dict[str, np.ndarray]:
        sizes = {"param": 1.0, "grad": 4.0, "first": 0.1, "second": 0.1}
        drawn = {f"{key}{i}": random.normal(size=shape) * sizes[key] for i, shape in enumerate(twin) for key in names}
        return {key: value**2 if key.startswith("second") else value for key, value in drawn.items()}

    def call(implementation: str, **arrays: Any) -> Any:
        take = lambda i: [arrays[f"{key}{i}"] for key in names]
        # A parameter or moment in 16 bits is rounded by its place: here the noise is not what is tested.
        wide = lambda array: array.astype(jnp.promote_types(array.dtype, jnp.float32))
        leaves = [
            fused_optimizer.Leaf(wide(param), grad, tuple(map(wide, moments)))
            for param, grad, *moments in map(take, range(len(twin)))
        ]
        update = getattr(fused_optimizer, rule)
        found = update(leaves, rate=0.01, count=7, factor=0.25, decay=0.1, returns=returns, implementation=implementation)
        return [(one.value, one.moments) for one in found]

    return {f"{rule} {name} {returns}": Row(op, make, call, False)}


def attentions(name: str, length: int, *, segments: int = 0, head_dim: int = 8, **options: Any) -> dict[str, Row]:
    """`segments`: 1, each place has one; 2, keys have their own, so that some queries see no key. Blocks of five places."""
    twin = attention_shapes.SHAPES[name].twin(length)
    settings = {"sliding_window": twin.sliding_window, "soft_cap": twin.soft_cap and 3.0, **options}

    def make(random: Generator) -> dict[str, np.ndarray]:
        heads = {"q": twin.num_heads, "k": twin.num_kv_heads, "v": twin.num_kv_heads}
        found = {key: random.normal(size=(twin.batch, length, num, head_dim)) for key, num in heads.items()}
        for key in ("segment_ids", "kv_segment_ids")[:segments]:
            found[key] = np.sort(random.integers(0, 3, (twin.batch, length)), axis=1) + (key == "kv_segment_ids")
        return found

    def call(implementation: str, **arrays: Any) -> Any:
        more = {"chunk": 5} if implementation == "chunked" else {}
        found = pallas_kernels.attention(**arrays, **settings, **more, implementation=implementation)
        return jax.tree.map(lambda part: jnp.where(jnp.isinf(part), 0.0, part), found)  # the log-sum-exp of no key

    said = ",".join(f"{key}={value}" for key, value in {"length": length, "segments": segments, **options}.items())
    return {f"attention {name} {said}": Row(ATTENTION, make, call)}


ROWS_OF_ODD_LENGTH = (
    "gpt2-124m length=17", "llama-8b length=20", "mixtral-8x7b length=23", "gemma-2-9b length=13", "llama-70b length=11",
)  # fmt: skip
ROWS: dict[str, Row] = {
    **heads("gpt2-124m"),
    **heads("llama-8b", label_smoothing=0.1),
    **heads("mixtral-8x7b", z_loss=1e-2),
    **heads("gpt2-1.5b", soft_cap=3.0),
    **heads("llama-70b", ignore_index=2, label_smoothing=0.1, z_loss=1e-2, soft_cap=5.0),
    **norms("gpt2-124m", centred=True, has_residual=True),
    **norms("gpt2-124m", centred=True, has_residual=False),
    **norms("llama-8b", centred=False, has_residual=True),
    **norms("one row", centred=False, has_residual=False),
    **quantizers("one block", "int8"),
    **quantizers("one block", "int8", seed=3),
    **quantizers("gpt2-124m mlp", "int8", seed=3),
    **quantizers("llama-8b mlp", "int4"),
    **quantizers("one block", "int4", seed=4),
    **quantizers("one block", "float8_e4m3"),
    **quantizers("one block", "float8_e4m3", seed=5),
    **quantizers("gpt2-124m mlp", "float8_e5m2"),
    **quantizers("one block", "float8_e5m2", seed=6),
    **quantizers("one block", "dynamic"),
    **quantizers("one block", "dynamic_unsigned"),
    **quantizers("odd", "int8", seed=7),
    **quantizers("odd", "int4"),
    **optimizers("adamw", "one block"),
    **optimizers("adamw", "matrix", returns="params"),
    **optimizers("adamw", "bucket"),
    **optimizers("lion", "one block"),
    **optimizers("lion", "matrix", returns="params"),
    **optimizers("lion", "bucket"),
    **attentions("gpt2-124m", 17, causal=False),
    **attentions("llama-8b", 20, segments=1),
    **attentions("mixtral-8x7b", 23),
    **attentions("gemma-2-9b", 13, segments=1, causal=False, return_lse=True),
    **attentions("llama-70b", 11, segments=2, causal=False, return_lse=True),
    **attentions("llama-8b", 256, segments=1, head_dim=64),
    **attentions("gemma-2-9b", 128, head_dim=128),
    **attentions("gpt2-124m", 128, causal=False, head_dim=64),
}


# Rows that an implementation says it cannot do, or that no CPU can interpret: (implementation, row's beginning) -> why.
CANNOT = {
    ("cudnn", "attention"): "runs on a GPU",
    **{
        (kernel, f"{row} odd"): "whole blocks of 256"
        for kernel in ("mosaic_gpu", "mosaic_tpu")
        for row in ("quantize int8", "quantize int4", "dequantize int4")
    },
    **{("splash", f"attention {row}"): "multiples of 128" for row in ROWS_OF_ODD_LENGTH},
}


def cases() -> list[tuple[str, str]]:
    """(row, implementation) of everything but references."""
    return [(name, one) for name, row in ROWS.items() for one in row.op.table if one != row.op.reference]


def why_not(name: str, implementation: str) -> str | None:
    """Why an implementation cannot run a row here, as it is listed."""
    found = [why for (one, row), why in CANNOT.items() if one == implementation and name.startswith(row)]
    return found[0] if found else None


def is_real(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def value_and_gradient(row: Row, implementation: str, arrays: dict[str, Any], weights: list[Any]) -> list[np.ndarray]:
    """Outputs, then gradients of their weighted sum where there are any, as float64."""
    if not row.is_differentiable:
        outs = jax.jit(lambda given: row.call(implementation, **given))(arrays)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(outs)]
    real = {name: array for name, array in arrays.items() if is_real(array)}

    def weighted(real: dict[str, Any]) -> Any:
        outs = jax.tree.leaves(row.call(implementation, **{**arrays, **real}))
        wide = [out.astype(jnp.promote_types(out.dtype, jnp.float32)) for out in outs]
        return sum(jnp.sum(out * jnp.asarray(one, out.dtype)) for out, one in zip(wide, weights, strict=True)), outs

    (_, outs), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(real)
    return [np.asarray(leaf, np.float64) for leaf in (*outs, *jax.tree.leaves(grads))]


def output_shapes(row: Row, arrays: dict[str, Any]) -> list[tuple[int, ...]]:
    outs = jax.eval_shape(lambda: row.call(row.op.reference, **arrays))
    return [out.shape for out in jax.tree.leaves(outs)]


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2 distance; not a number stays so."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))
