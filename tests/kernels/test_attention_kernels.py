"""Attention beyond the law table: any shape, parts put together, memory, choices, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.attention import ATTENTION, chunked
from pallas_kernels.attention.blocks import Scores

H100 = "NVIDIA H100 80GB HBM3"


def operands(random, length, keys, groups, num_kv_heads=2, head_dim=4):
    shapes = [(2, length, groups * num_kv_heads), (2, keys, num_kv_heads), (2, keys, num_kv_heads)]
    return [jnp.asarray(random.normal(size=(*shape, head_dim)), jnp.float32) for shape in shapes]


def both(name, q, k, v, **options):
    def total(q, k, v):
        out, lse = pallas_kernels.attention(q, k, v, return_lse=True, implementation=name, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, jnp.cos(lse)))

    return jax.value_and_grad(total, (0, 1, 2))(q, k, v)


@settings(max_examples=2, deadline=None, derandomize=False)
@example(length=1, others=1, groups=1, chunk=1, causal=False, window=None, segments=2, seed=0)  # a query that sees no key
@given(
    length=st.integers(1, 11), others=st.integers(1, 11), groups=st.integers(1, 3), chunk=st.integers(1, 12),
    causal=st.booleans(), window=st.sampled_from([None, 1, 2, 5, 40]), segments=st.integers(0, 2), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(length, others, groups, chunk, causal, window, segments, seed):
    random = np.random.default_rng(seed)
    keys = length if causal or window or segments == 1 else others
    ids = [jnp.asarray(random.integers(0, 3, (2, size))) for size in (length, keys)][:segments]
    options = {"causal": causal, "sliding_window": window, **dict(zip(("segment_ids", "kv_segment_ids"), ids, strict=False))}
    arrays = operands(random, length, keys, groups)
    found, wanted = both("chunked", *arrays, chunk=chunk, **options), both("plain", *arrays, **options)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 9])
def test_pairs_of_blocks_are_those_with_something_in_sight(causal, window):
    cut = chunked.Cut(causal, window, Scores(1.0), 4, 18, 18)
    away = np.arange(18)[:, None] - np.arange(18)[None]
    seen = (away >= 0 if causal else away > -99) & ((abs(away) < window) if window else True)
    assert cut.pairs() == [
        (i, j) for i in range(5) for j in range(5) if seen[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].any()
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_parts_of_the_keys_put_together_are_the_whole(name):
    """As a ring does: results over parts of the keys, weighted by their log-sum-exps, and the gradient through both."""
    q, k, v = operands(np.random.default_rng(), 8, 8, 2)

    def in_parts(q, k, v):
        halves = [slice(0, 4), slice(4, 8)]
        parts = [
            pallas_kernels.attention(q, k[:, half], v[:, half], causal=False, return_lse=True, implementation=name)
            for half in halves
        ]
        total = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(jnp.exp(lse - total)[..., None] * out for out, lse in parts)

    def whole(q, k, v):
        return pallas_kernels.attention(q, k, v, causal=False, implementation="plain")

    gradient = lambda run: jax.grad(lambda *arrays: jnp.sum(jnp.sin(run(*arrays))), (0, 1, 2))
    np.testing.assert_allclose(in_parts(q, k, v), whole(q, k, v), rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradient(in_parts)(q, k, v), gradient(whole)(q, k, v), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_scores_never_exist_at_once():
    q, k, v = (jnp.ones((1, 1024, heads, 8)) for heads in (4, 2, 2))

    def temp_bytes(**options):
        total = lambda q, k, v: jnp.sum(pallas_kernels.attention(q, k, v, **options))
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 4 * 1024**2
    assert temp_bytes(implementation="plain") > scores
    assert temp_bytes(implementation="chunked", chunk=128) < 0.2 * scores


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_blocks_inside_shard_map(check_vma):
    """Over batch and heads, types checked or not: what the loop starts with varies as the operands do."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = operands(np.random.default_rng(), 6, 6, 2)
    local = lambda q, k, v: pallas_kernels.attention(q, k, v, chunk=4, implementation="chunked")
    split = P("data", None, "tensor")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=check_vma)
    wanted, pull = jax.vjp(lambda *a: pallas_kernels.attention(*a, implementation="plain"), q, k, v)
    found, own = jax.vjp(jax.jit(mapped), q, k, v)
    for one, other in zip((found, *own(q)), (wanted, *pull(q)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def choice(kind, length=1024, heads=8, dtype=jnp.bfloat16, manual=True, **options):
    q, k = (jax.ShapeDtypeStruct((2, length, num, 64), dtype) for num in (heads, 4))
    run = lambda q, k: pallas_kernels.attention(q, k, k, **options)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False) if manual else run
    with pallas_kernels.target(kind), pallas_kernels.recording() as choices:
        jax.eval_shape(run, q, k)
    return choices[0]


def test_what_is_chosen_and_why(monkeypatch):
    assert choice("cpu").implementation == "plain"
    assert "no GPU here" in choice(H100).reason
    assert "never run on a TPU v5p" in choice("TPU v5p").reason
    assert "cannot split it" in choice("TPU v5p", manual=False).reason
    by_blocks = choice("cpu", length=16384, heads=32)
    assert by_blocks.implementation == "chunked"
    assert "scores take 34,360 MB" in by_blocks.reason
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # Not traced: JAX would ask a GPU that is not there.
    arrays = tuple(jax.ShapeDtypeStruct((2, 1024, num, 64), jnp.bfloat16) for num in (8, 4, 4))
    options = {"causal": True, "sliding_window": None, "soft_cap": None, "return_lse": False}
    call = pallas_kernels.dispatch.Call(H100, arrays, options)
    assert ATTENTION.choose(call) == (ATTENTION.table["cudnn"], "preferred here")
    for change, why in (
        ({"soft_cap": 30.0}, "no soft cap"), ({"return_lse": True}, "no gradient"), ({"chunk": 4}, "of 'chunked'"),
        ({"causal": False, "sliding_window": 5}, "only where attention is causal"),
    ):  # fmt: skip
        assert why in ATTENTION.choose(call._replace(options={**options, **change}))[1]
    assert "not float32" in ATTENTION.choose(call._replace(arrays=tuple(a.update(dtype=jnp.float32) for a in arrays)))[1]
    partly = ATTENTION.choose(call._replace(is_local=True, auto_axes=("tensor",)))
    assert "fails over tensor" in partly[1]


Q, K = jnp.ones((2, 8, 4, 8)), jnp.ones((2, 8, 2, 8))
IDS = jnp.zeros((2, 8), int)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    {
        "head dim": ((Q, K[..., :4], K[..., :4]), {}, r"float32\[2,8,2,4\]"),
        "heads": ((Q[:, :, :3], K, K), {}, "K=2 key-value heads do not divide H=3"),
        "dtype": ((Q, K, K.astype(jnp.bfloat16)), {}, "float32, float32, bfloat16"),
        "length": ((Q, K[:, :4], K[:, :4]), {}, "T=8 queries need as many keys, not S=4"),
        "segments": ((Q, K, K), {"segment_ids": IDS[:, :3]}, r"shape \[2, 8\], got int32\[2,3\]"),
        "integers": ((Q, K, K), {"segment_ids": IDS * 1.0}, "must be integers"),
        "of keys": ((Q, K, K), {"kv_segment_ids": IDS}, "without segment_ids"),
        "of more keys": ((Q, K[:, :4], K[:, :4]), {"causal": False, "segment_ids": IDS}, "say nothing of S=4 keys"),
        "window": ((Q, K, K), {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        "cap": ((Q, K, K), {"soft_cap": 0.0}, "soft_cap=0.0 must be more than 0"),
        "chunk": ((Q, K, K), {"chunk": 0}, "chunk=0 must be at least 1"),
    }.values(),
)
def test_what_does_not_fit_is_named(arrays, options, words):
    with pytest.raises(ValueError, match=words):
        pallas_kernels.attention(*arrays, **options)


def test_a_name_insists():
    with pytest.raises(NotImplementedError, match=r"runs on a GPU.*\n.*on cpu\n.*takes 'plain' here"):
        pallas_kernels.attention(Q, K, K, implementation="cudnn")
    with pallas_kernels.target("TPU v5p"), pytest.raises(NotImplementedError, match="multiples of 128, not 8"):
        pallas_kernels.attention(Q, K, K, implementation="splash")
    with pytest.raises(NotImplementedError, match="chunk= is of 'chunked'"):
        pallas_kernels.attention(Q, K, K, chunk=4, implementation="plain")
    with pytest.raises(ValueError, match="Did you mean 'chunked'"):
        pallas_kernels.attention(Q, K, K, implementation="chunkd")


def test_a_program_means_what_its_references_mean():
    """Also where another implementation is named, and in a function that jit has traced before."""
    run = jax.jit(lambda q, k: pallas_kernels.attention(q, k, k, implementation="chunked"))
    outside = str(jax.make_jaxpr(run)(Q, K))
    with pallas_kernels.by_definition(), pallas_kernels.recording() as choices:
        inside = str(jax.make_jaxpr(run)(Q, K))
    assert "scan" in outside
    assert "scan" not in inside
    assert choices == []
