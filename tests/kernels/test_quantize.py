"""Numbers in 8 and 4 bits: bounds, the mean of stochastic rounding, blocks that are zero or not finite, what is refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize as q
from pallas_kernels import rounding
from pallas_kernels.quantize.formats import FORMATS

# Of the block's largest magnitude: half a step, to the nearest (a float's below a power of two, relative to the value).
BOUNDS = {"int8": 0.5 / 127, "int4": 0.5 / 7, "float8_e4m3": 2.0**-4, "float8_e5m2": 2.0**-3}
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 512)), jnp.float32)


def there_and_back(x, format, **options):
    size = {"size": x.shape[options.get("dim", -1)]}
    block = {name: options[name] for name in ("block", "dim") if name in options}
    return q.dequantize(*q.quantize(x, format, **options), format, **block, **size)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 3), width=st.integers(1, 40), block=st.sampled_from([2, 6, 16]), seed=st.integers(0, 2**31),
    format=st.sampled_from(sorted(BOUNDS)), dim=st.sampled_from([0, 1, -1]), is_stochastic=st.booleans(),
)  # fmt: skip
def test_any_shape_stays_within_the_bound(rows, width, block, seed, format, dim, is_stochastic):
    random = np.random.default_rng(seed)
    x = (random.normal(size=(rows, width)) * 10.0 ** random.uniform(-20, 20)).astype(np.float32)
    back = there_and_back(jnp.asarray(x), format, block=block, dim=dim, seed=seed if is_stochastic else None)
    lines = np.moveaxis(np.stack([x, np.asarray(back)]), dim % 2 + 1, -1)
    step = BOUNDS[format] * (2 if is_stochastic else 1)
    for start in range(0, lines.shape[-1], block):
        exact, found = lines[..., start : start + block].astype(np.float64)
        largest = np.abs(exact).max(-1, keepdims=True)
        size = np.maximum(np.abs(exact), largest * 2.0**-12) if "float" in format else largest
        assert (np.abs(found - exact) <= (step + 1e-6) * size).all()


@pytest.mark.parametrize("format", ["float8_e4m3", "float8_e5m2"])
def test_codes_of_floats_are_those_of_a_cast(format):
    form, random = FORMATS[format], np.random.default_rng()
    y = np.concatenate(
        [random.uniform(-1, 1, 4000) * form.top * 2.0 ** random.integers(-34, 1, 4000), [0.0, form.top, -form.top]]
    )
    y = y.astype(np.float32)
    dtype = ml_dtypes.float8_e4m3fn if "e4m3" in format else ml_dtypes.float8_e5m2
    codes = np.asarray(form.encode(jnp.asarray(y), None)).astype(np.uint8)
    cast = y.astype(dtype).view(np.uint8)
    assert ((codes == cast) | ((y == 0) | (cast & 127 == 0)) & (codes & 127 == cast & 127)).all()  # zero may have a sign
    every = np.array([code for code in range(256) if np.isfinite(np.uint8(code).view(dtype).astype(np.float32))], np.uint8)
    np.testing.assert_array_equal(form.decode(jnp.asarray(every, jnp.int32)), every.view(dtype).astype(np.float32))


@pytest.mark.parametrize("format", sorted(BOUNDS))
def test_stochastic_rounding_keeps_the_mean(format):
    x = jnp.full((400, 256), 0.3137, jnp.float32).at[:, 0].set(1.0)  # 102,000 draws between two codes
    values = np.asarray(there_and_back(x, format, seed=11), np.float64)[:, 1:]
    assert len(np.unique(values)) == 2
    step, p = np.ptp(values), (0.3137 - values.min()) / np.ptp(values)
    assert abs(values.mean() - 0.3137) < 5 * step * np.sqrt(p * (1 - p) / values.size)
    nearest = np.asarray(there_and_back(x, format))[:, 1:]
    assert abs(nearest.mean() - 0.3137) > abs(values.mean() - 0.3137)


def test_noise_is_even_and_differs_by_seed_and_place():
    """Each bit half of the time, neighbours and neighbouring seeds unrelated: within 5 standard deviations of 2^18 draws."""
    draws = [np.asarray(rounding.bits(rounding.places((512, 512)), rounding.fold(seed))).ravel() for seed in (0, 1)]
    spread = 5 * 0.5 / np.sqrt(draws[0].size)
    signs = lambda bits: ((bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.int8) * 2 - 1
    a, b = map(signs, draws)
    assert np.abs(a.mean(0)).max() / 2 < spread
    for other in (b, np.roll(a, 1, 0), np.roll(a, 512, 0)):
        assert np.abs((a * other).mean(0)).max() / 2 < spread
    counts = np.bincount(draws[0] >> 24, minlength=256)
    assert ((counts - 1024.0) ** 2 / 1024).sum() < 255 + 5 * np.sqrt(2 * 255)  # chi squared


@pytest.mark.parametrize("format", list(FORMATS))
def test_zeros_and_what_is_not_finite(format):
    x = jnp.abs(X[:5]).at[0, :256].set(0.0).at[1, 3].set(jnp.nan).at[2, 300].set(-jnp.inf).at[3, :256].set(1e-31)
    codes, scales, error = q.quantize_with_feedback(x, jnp.full_like(x, 0.25), format)
    back = np.asarray(q.dequantize(codes, scales, format))
    assert np.isnan(back[1, :256]).all()
    assert np.isnan(back[2, 256:]).all()
    assert np.isfinite(back).sum() == back.size - 512
    assert (np.asarray(error)[~np.isfinite(back)] == 0.25).all()
    codes, scales = q.quantize(x, format)
    back = np.asarray(q.dequantize(codes, scales, format))
    assert (scales[0, 0], scales[3, 0]) == (0, 0)
    assert (back[0, :256] == 0).all()
    assert (back[3, :256] == 0).all()


def test_what_is_left_over_comes_next_time():
    """The sum of what was sent approaches the sum of what was to be sent: the error stays bounded, it does not add up."""
    x, error, sent, rounded = X[:1] * 0.01 + jnp.eye(1, 512), jnp.zeros((1, 512)), 0.0, 0.0
    for _ in range(30):
        codes, scales, error = q.quantize_with_feedback(x, error, "int4")
        sent += q.dequantize(codes, scales, "int4")
        rounded += there_and_back(x, "int4")
    assert jnp.abs(sent + error - 30 * x).max() < 1e-4
    assert jnp.abs(sent - 30 * x).max() < 0.15 < jnp.abs(rounded - 30 * x).max()


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    {
        "format": (lambda: q.quantize(X, "int9"), ValueError, r"no such format\n.*int9.*\nDid you mean 'int8'"),
        "dim": (lambda: q.quantize(X, dim=2), ValueError, r"dim=2 of float32\[6,512\]"),
        "empty": (lambda: q.quantize(X[:0]), ValueError, r"float32\[0,512\]"),
        "block": (lambda: q.quantize(X, "int4", block=3), ValueError, "block=3"),
        "integers": (lambda: q.quantize(X.astype(int)), TypeError, r"x int32\[6,512\]"),
        "map": (lambda: q.quantize(X, "dynamic", seed=1), ValueError, "rounds to nearest only"),
        "error": (lambda: q.quantize_with_feedback(X, X[0]), ValueError, r"error float32\[512\]\nx float32\[6,512\]"),
        "codes": (lambda: q.dequantize(*q.quantize(X), "int4"), TypeError, r"int8\[6,512\], int4 is stored as uint8"),
        "scales": (lambda: q.dequantize(*q.quantize(X), block=128), ValueError, r"scales float32\[6,2\]\n.*\[6, 4\]"),
        "kernel": (lambda: q.quantize(X, implementation="mosaic_gpu"), NotImplementedError, "runs on a GPU"),
        "derivative": (lambda: jax.grad(lambda x: q.quantize(x)[1].sum())(X), NotImplementedError, "no derivative"),
    }.values(),
)
def test_what_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
