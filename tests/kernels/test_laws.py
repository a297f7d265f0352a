"""Every operation x implementation x shape x dtype: value and gradient equal the float64 reference's."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import DTYPES, ROWS, apart, cases, is_real, output_shapes, value_and_gradient, why_not

import pallas_kernels

QUICK = {  # seconds each; `make test-all` runs every row
    ("sum gpt2-124m ", "fused", "bfloat16"),
    ("sum gpt2-124m ", "chunked", "bfloat16"),
    ("sum llama-70b ignore_index=2,label_smoothing=0.1,z_loss=0.01,soft_cap=5.0", "fused", "float32"),
    ("losses llama-70b ignore_index=2,label_smoothing=0.1,z_loss=0.01,soft_cap=5.0", "chunked", "float32"),
    ("layer norm gpt2-124m + residual", "mosaic_tpu", "float32"),
    ("layer norm gpt2-124m + residual", "mosaic_gpu", "float32"),
    ("quantize int4 one block seed=4", "mosaic_tpu", "bfloat16"),
    ("quantize int4 one block seed=4", "mosaic_gpu", "bfloat16"),
    ("dequantize float8_e4m3 one block", "mosaic_tpu", "bfloat16"),
    ("dequantize float8_e4m3 one block", "mosaic_gpu", "bfloat16"),
    ("adamw one block updates", "mosaic_tpu", "float32"),
    ("adamw one block updates", "mosaic_gpu", "float32"),
    ("quantize int8 odd seed=7", "mosaic_gpu", "float32"),
    ("attention llama-70b length=11,segments=2,causal=False,return_lse=True", "chunked", "float32"),
    ("attention mixtral-8x7b length=23,segments=0", "chunked", "bfloat16"),
    ("attention llama-8b length=256,segments=1", "splash", "bfloat16"),
    ("attention llama-8b length=20,segments=1", "splash", "float32"),
    ("attention llama-8b length=20,segments=1", "cudnn", "float32"),
}


def law_cases():
    for name, implementation in cases():
        for dtype in DTYPES:
            is_slow = (name, implementation, dtype) not in QUICK
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(name, implementation, dtype, marks=marks)


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(law_cases()))
def test_parity(name, implementation, dtype):
    row, seed = ROWS[name], time.time_ns() % 2**32
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    drawn = {key: value.astype(jnp.dtype(dtype)) if is_real(value) else value for key, value in row.make(random).items()}
    arrays = {key: jnp.asarray(value) for key, value in drawn.items()}
    if why := why_not(name, implementation):
        with pytest.raises(NotImplementedError, match=why), pallas_kernels.interpreted():
            row.call(implementation, **arrays)
        return
    weights = [random.normal(size=shape) for shape in output_shapes(row, arrays)]
    with jax.enable_x64(True):
        exact = {key: jnp.asarray(value, jnp.float64 if is_real(value) else value.dtype) for key, value in drawn.items()}
        wanted = value_and_gradient(row, row.op.reference, exact, weights)
    own = value_and_gradient(row, row.op.reference, arrays, weights)
    with pallas_kernels.interpreted():
        found = value_and_gradient(row, implementation, arrays, weights)
    allowed = 1e-5 if dtype == "float32" else 4e-3  # of bfloat16's 8 bits: one rounding of the result
    for one, reference, true in zip(found, own, wanted, strict=True):
        assert apart(one, true) <= 1.5 * apart(reference, true) + allowed


def test_quick_rows_exist():
    assert {(name, implementation) for name, implementation, _ in QUICK} <= set(cases())
