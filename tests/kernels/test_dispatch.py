"""Choices: what is chosen, what is refused and how it is said, and that no call is missing from the record."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import fused_optimizer, norm

X, W, TARGETS = jnp.ones((2, 8, 128)), jnp.ones((128, 16)), jnp.zeros((2, 8), int)
H100 = "NVIDIA H100 80GB HBM3"


def head(x):
    return pallas_kernels.linear_cross_entropy_sum(x, W, TARGETS)


def test_every_call_is_recorded_with_its_reason():
    with pallas_kernels.target(H100), pallas_kernels.recording() as outer, pallas_kernels.recording() as inner:
        jax.make_jaxpr(jax.grad(lambda x: head(norm.rms_norm(x, jnp.ones(128)))))(X)
    assert outer == inner
    assert [(one.op, one.implementation) for one in inner] == [("norm", "reference"), ("linear_cross_entropy_sum", "fused")]
    assert "never run on a NVIDIA H100" in inner[0].reason
    assert "this is for NVIDIA H100" in inner[0].reason  # and the TPU's kernel is for another device


def test_a_cached_trace_hides_nothing_from_the_program():
    cached = jax.jit(head)
    jax.make_jaxpr(cached)(X)
    with pallas_kernels.recording() as choices:
        program = jax.make_jaxpr(jax.grad(lambda x: jax.lax.map(cached, x[None])[0] + jax.checkpoint(cached)(x)))(X)
    found = pallas_kernels.found_in(program)
    assert {(one.op, one.implementation) for one in found} == {("linear_cross_entropy_sum", "fused")}
    assert len(found) >= 2 > len(choices)


def test_disabled_takes_references_unless_named():
    with pallas_kernels.disabled(), pallas_kernels.recording() as choices:
        head(X)
        pallas_kernels.linear_cross_entropy_sum(X, W, TARGETS, implementation="chunked")
    assert [one.implementation for one in choices] == ["reference", "chunked"]
    assert choices[0].reason == "kernels are disabled"


def test_a_name_insists():
    with pytest.raises(ValueError, match=r"no such implementation\n.*'chunkd'.*\n.*Did you mean 'chunked'"):
        pallas_kernels.linear_cross_entropy(X, W, TARGETS, implementation="chunkd")
    with pytest.raises(NotImplementedError, match=r"runs on a GPU.*\n.*on cpu\n.*takes 'reference' here"):
        norm.rms_norm(X, jnp.ones(128), implementation="mosaic_gpu")
    with pallas_kernels.target("TPU v5 lite"), pytest.raises(NotImplementedError, match="multiple of 128"):
        norm.rms_norm(jnp.ones((8, 100)), jnp.ones(100), implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("call", "words"),
    {
        "weight": (lambda: pallas_kernels.linear_cross_entropy(X, W.T, TARGETS), r"float32\[16,128\] with vocab_dim=1"),
        "targets": (lambda: pallas_kernels.linear_cross_entropy(X, W, TARGETS[:1]), r"shape \[2, 8\]"),
        "weights": (lambda: pallas_kernels.linear_cross_entropy_sum(X, W, TARGETS, jnp.ones(3)), r"weights.*float32\[3\]"),
        "vocabulary": (lambda: pallas_kernels.linear_cross_entropy(X, W, TARGETS, vocab_size=999), "vocab_size=999"),
        "chunks": (lambda: pallas_kernels.linear_cross_entropy(X, W, TARGETS, num_chunks=-1), "at least 1"),
        "scale": (lambda: norm.rms_norm(X, jnp.ones(127)), r"scale float32\[127\]"),
        "residual": (lambda: norm.layer_norm(X, jnp.ones(128), residual=X[0]), r"residual float32\[8,128\]"),
    }.values(),
)
def test_shapes_that_disagree_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_on_one_device_nothing_is_split():
    """A kernel that a partitioner would gather for is refused for that reason on two devices, and not on one."""
    w = jnp.ones((8, 128))
    for num_devices, is_split in ((2, True), (1, False)):
        with pallas_kernels.target(H100, num_devices), pallas_kernels.recording() as choices:
            fused_optimizer.adamw([fused_optimizer.Leaf(w, w, (w, w))], rate=0.1, count=1, bucket_below=0)
        assert ("may be split over devices" in choices[0].reason) == is_split
        assert ("never run on a NVIDIA H100" in choices[0].reason) != is_split
