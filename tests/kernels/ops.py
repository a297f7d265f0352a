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
from pallas_kernels import norm
from pallas_kernels.linear_cross_entropy import LOSSES, TOTAL, shapes
from pallas_kernels.norm import NORM
from pallas_kernels.norm import shapes as norm_shapes

DTYPES = ("float32", "bfloat16")


class Row(NamedTuple):
    """`call(arrays, implementation)` gives what is compared, gradients of float arrays included."""

    op: Any
    make: Callable[[Generator], dict[str, np.ndarray]]
    call: Callable[..., Any]  # (implementation, **arrays) -> arrays


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
}


def cases() -> list[tuple[str, str]]:
    """(row, implementation) of everything but references."""
    return [(name, one) for name, row in ROWS.items() for one in row.op.table if one != row.op.reference]


def is_real(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def value_and_gradient(row: Row, implementation: str, arrays: dict[str, Any], weights: list[Any]) -> list[np.ndarray]:
    """Outputs, then gradients of their weighted sum, as float64."""
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
