"""The head alone: any shape, the vocabulary over a mesh axis, the batch over another, and what a program holds and moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from jzero.audit import audit
from jzero.reduction import analyze, is_per_example, is_sum
from pallas_kernels.linear_cross_entropy import chunks

FUNCTIONS = (pallas_kernels.linear_cross_entropy, pallas_kernels.linear_cross_entropy_sum)


def draw(random, *shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def both(function, x, w, targets, **options):
    """Value and gradient of the summed result, chunked and by the reference."""

    def run(name, **more):
        return jax.value_and_grad(
            lambda x, w: jnp.sum(function(x, w, targets, implementation=name, **options, **more)), (0, 1)
        )(x, w)

    return run("chunked"), run("reference")


def assert_close(found, wanted, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * float(jnp.abs(other).max()))


@settings(max_examples=3, deadline=None, derandomize=False)
@given(
    length=st.integers(1, 9), vocab=st.integers(1, 12), dim=st.integers(1, 5), num_chunks=st.integers(1, 12),
    leading=st.sampled_from([(), (2,), (2, 3)]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(length, vocab, dim, num_chunks, leading, seed):
    random = np.random.default_rng(seed)
    x, w = draw(random, *leading, length, dim), draw(random, dim, vocab)
    targets = jnp.asarray(random.integers(0, vocab, (*leading, length)))
    assert_close(*both(FUNCTIONS[seed % 2], x, w, targets, num_chunks=num_chunks), tolerance=1e-4)


@pytest.mark.parametrize(
    ("function", "name", "check_vma"),
    [
        (FUNCTIONS[0], "chunked", True),
        (FUNCTIONS[1], "fused", False),
        pytest.param(FUNCTIONS[0], "chunked", False, marks=pytest.mark.slow),
        pytest.param(FUNCTIONS[1], "fused", True, marks=pytest.mark.slow),
    ],
)
def test_vocabulary_over_a_mesh_axis(function, name, check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng()
    x, w = draw(random, 4, 6, 5), draw(random, 5, 32)
    targets = jnp.asarray(random.integers(0, 29, (4, 6)))
    options = {"vocab_size": 29, "label_smoothing": 0.1, "z_loss": 0.01, "num_chunks": 3}

    def local(x, w, targets):
        out = function(x, w, targets, axis_name="tensor", implementation=name, **options)
        return jax.lax.psum(jnp.sum(out), "data")

    specs = (P("data"), P(None, "tensor"), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    found = jax.jit(jax.value_and_grad(lambda x, w: sharded(x, w, targets), (0, 1)))(x, w)
    assert_close(found, both(function, x, w, targets, **options)[1])


@pytest.mark.parametrize("name", ["chunked", "fused"])
def test_a_split_batch_is_not_gathered(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((8, 64, 32), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((32, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
    targets = jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    total = lambda x, w, t: pallas_kernels.linear_cross_entropy_sum(x, w, t, num_chunks=4, implementation=name)
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, w, targets).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    reduced = [one.elements * one.count for one in audit(compiled, mesh).collectives]
    assert sum(reduced) == 32 * 256  # w's gradient, once, in whatever parts


@pytest.mark.parametrize(("function", "name"), [(FUNCTIONS[0], "chunked"), (FUNCTIONS[1], "chunked"), (FUNCTIONS[1], "fused")])
def test_examples_stay_apart(function, name):
    """jzero may compute it shard by shard: per token along dim 0, or a sum over examples."""
    shapes = [((2, 8, 4), jnp.float32), ((4, 16), jnp.float32), ((2, 8), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    state = analyze(
        lambda x, w, t: [function(x, w, t, num_chunks=3, z_loss=0.1, implementation=name)], args, [0, None, 0]
    ).outputs[0]
    assert is_sum(state) if function is FUNCTIONS[1] else is_per_example(state, 0), state


def test_logits_never_exist_at_once():
    """The largest temporaries are one chunk's logits and the weight's gradient."""
    batch, length, dim, vocab = 2, 256, 32, 4096
    x, w, targets = jnp.ones((batch, length, dim)), jnp.ones((dim, vocab)), jnp.zeros((batch, length), int)

    def temp_bytes(**options):
        total = lambda x, w: pallas_kernels.linear_cross_entropy_sum(x, w, targets, **options)
        return jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocab
    assert temp_bytes(implementation="reference") > logits
    assert temp_bytes(implementation="chunked", num_chunks=8) < 0.5 * logits


def test_parts_cover_the_vocabulary():
    for vocab, number in ((1, 8), (7, 3), (1000, 4), (128256, None)):
        cut = chunks.cut(vocab, number)
        covered = [
            column for index in range(cut.number)
            for column in range(int(cut.start(index)), int(cut.start(index)) + cut.size) if column >= index * cut.size
        ]  # fmt: skip
        assert covered == list(range(vocab))


def test_the_choice_is_by_one_examples_logits():
    """The batch must not decide: jzero traces a loss at two batch sizes."""
    for batch in (1, 64):
        x = jax.ShapeDtypeStruct((batch, 1024, 768), jnp.bfloat16)
        small, large = (jax.ShapeDtypeStruct((768, size), jnp.bfloat16) for size in (50304, 256000))
        targets = jax.ShapeDtypeStruct((batch, 1024), jnp.int32)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        by_shard = jax.shard_map(pallas_kernels.linear_cross_entropy_sum, mesh=mesh, in_specs=P(), out_specs=P())
        with pallas_kernels.recording() as choices:
            for w in (small, large):
                jax.eval_shape(by_shard, x, w, targets)
            jax.eval_shape(pallas_kernels.linear_cross_entropy_sum, x, large, targets)
        assert [one.implementation for one in choices] == ["fused", "chunked", "fused"]
        assert "logits take 524 MB" in choices[1].reason
