"""GPT-2, Llama and Mixtral: published sizes, scan against unrolled, causality, dtypes, the padded vocabulary."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jzero import models, remat
from jzero.attention import choose_attention
from jzero.models.matmul import matmul, matmul_transposed

# openai/gpt-2 and meta-llama's model cards, counted as transformers counts them.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}
TINY = ("gpt2-tiny", "llama-tiny")
SMALL = {"num_layers": 2, "max_seq": 32}


@functools.cache
def small(name, **changes):
    model = models.build(name, **{**SMALL, **changes})
    model = model._replace(**{field: jax.jit(getattr(model, field)) for field in ("init", "apply", "loss", "embed", "head")})
    return model, model.init(jax.random.key(0)), jax.random.randint(jax.random.key(1), (2, 17), 0, 256)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert models.build(name).num_params == PUBLISHED[name]
    assert models.build(name, padded_vocab_size=128_512).num_params == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_first_loss_is_near_the_logarithm_of_the_vocabulary(name):
    model, params, tokens = small(name)
    assert abs(float(model.loss(params, tokens)) - np.log(256)) < 0.15


@pytest.mark.parametrize("name", [*TINY, pytest.param("mixtral-tiny", marks=pytest.mark.slow)])
def test_scanned_equals_unrolled(name):
    scanned, params, tokens = small(name)
    unrolled = models.build(name, scan_layers=False, **SMALL)
    listed = {**params, "layers": models.unstack(params["layers"])}
    assert jax.tree.structure(listed) == jax.tree.structure(jax.eval_shape(unrolled.init, jax.random.key(0)))
    np.testing.assert_allclose(scanned.apply(params, tokens), jax.jit(unrolled.apply)(listed, tokens), atol=1e-5)
    grads, listed_grads = (jax.jit(jax.grad(m.loss))(p, tokens) for m, p in ((scanned, params), (unrolled, listed)))
    listed_grads = {**listed_grads, "layers": models.stack(listed_grads["layers"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, listed_grads)


@pytest.mark.parametrize("name", TINY)
def test_a_later_token_changes_no_earlier_logits(name):
    model, params, tokens = small(name)
    changed = model.apply(params, tokens.at[:, 9].add(1)) != model.apply(params, tokens)
    assert not changed[:, :9].any()
    assert changed[:, 9:].any()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_activations_follow_the_parameters(name, dtype):
    model, params, tokens = small(name)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    dtypes = [jax.eval_shape(fn, half, tokens).dtype for fn in (model.embed, model.apply, model.loss)]
    assert dtypes == [dtype, dtype, jnp.float32]
    np.testing.assert_allclose(model.loss(half, tokens), model.loss(params, tokens), rtol=5e-3)


@pytest.mark.parametrize("name", ["gpt2-tiny", pytest.param("llama-tiny", marks=pytest.mark.slow)])
def test_padding_of_the_vocabulary_never_enters_the_loss(name):
    model, params, tokens = small(name, vocab_size=250)
    padded, padded_params, _ = small(name, vocab_size=250, padded_vocab_size=256)
    tables = jax.tree.map(lambda wide, leaf: wide.at[tuple(map(slice, leaf.shape))].set(leaf), padded_params, params)
    assert padded.apply(tables, tokens).shape == (2, 17, 250)
    np.testing.assert_allclose(padded.loss(tables, tokens % 250), model.loss(params, tokens % 250), rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_embed_layer_and_head_are_the_model(name):
    model, params, tokens = small(name)
    x, layer_fn = model.embed(params, tokens), jax.jit(model.layer)
    for layer in models.unstack(params["layers"]):
        x = layer_fn(x, layer)
    np.testing.assert_allclose(model.head(params, x), model.apply(params, tokens), atol=1e-5)


def test_matmul_gradients_are_those_of_a_plain_product():
    x, kernel, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 5, 6), (6, 7), (2, 5, 7)]))
    for ours, plain, weight in ((matmul, jnp.dot, kernel), (matmul_transposed, lambda x, w: x @ w.T, kernel.T)):
        got, expected = (jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) * g), (0, 1)))(x, weight) for f in (ours, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("product", [matmul, lambda x, w: matmul_transposed(x, w.T)])
def test_a_remat_policy_sees_the_products(product):
    """With the products saved the backward pass computes one less."""
    f = lambda x, w: jnp.sum(jnp.sin(product(jnp.sin(x), w)))
    x, w = jnp.ones((4, 6)), jnp.ones((6, 8))
    counts = {}
    for name in ("full", "dots"):
        policy = remat.get(name)
        counts[name] = str(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy), (0, 1)))(x, w)).count("dot_general[")
    assert counts["full"] == counts["dots"] + 1, counts


def test_attention_implementation_is_chosen_by_device_and_dtype():
    shape = lambda dtype: jax.ShapeDtypeStruct((1, 1024, 12, 64), dtype)
    chosen = lambda dtype, kind: choose_attention(shape(dtype), shape(dtype), device_kind=kind)
    dtypes, h100 = (jnp.float32, jnp.bfloat16, jnp.float16), "NVIDIA H100 80GB HBM3"
    assert {chosen(dtype, kind) for dtype in dtypes for kind in ("cpu", "TPU v5 lite", h100)} == {"plain"}  # no GPU here
    with mock.patch("jax.default_backend", return_value="gpu"):
        assert [chosen(dtype, h100) for dtype in dtypes] == ["plain", "cudnn", "cudnn"]


def test_flops_per_token_is_the_stated_formula():
    seq, config = 1024, models.PRESETS["gpt2-124m"]
    multiplied = PUBLISHED["gpt2-124m"] - config.max_seq * config.dim
    assert models.build(config).flops_per_token(seq) == 6 * multiplied + 12 * 12 * 768 * seq


def test_experts_count_as_many_times_as_a_token_uses_them():
    """12.9e9 parameters are active in Mixtral 8x7B (Jiang et al.), of which the embedding multiplies nothing."""
    model = models.build("mixtral-8x7b")
    attention = 12 * 32 * 4096 * 1024
    active = (model.flops_per_token(1024) - attention) / 6 + 32000 * 4096
    assert active == pytest.approx(12.9e9, rel=0.005)


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match=r"Did you mean 'gpt2-124m'"):
        models.build("gpt2-124")
    with pytest.raises(ValueError, match=r"Did you mean 'num_layers'"):
        models.build("gpt2-tiny", num_layer=2)
    with pytest.raises(ValueError, match=r"Did you mean 'ring'"):
        models.build("gpt2-tiny", attention_kind="rign")
    with pytest.raises(ValueError, match=r"at most 256 tokens"):
        models.build("gpt2-tiny").apply({}, jax.ShapeDtypeStruct((1, 300), jnp.int32))


@pytest.mark.parametrize(("name", "loss"), [("gpt2-tiny", "plain"), ("llama-tiny", "chunked")])
def test_a_pipeline_of_a_model_is_its_loss(name, loss):
    """With the head that was asked for: the chunked one makes no logits of all tokens."""
    model = models.build(name, num_layers=2, loss=loss)
    parts, arrange = models.pipeline(model)
    params, tokens = model.init(jax.random.key(0)), jnp.arange(34).reshape(2, 17)
    assert float(parts(arrange(params), tokens)) == pytest.approx(float(model.loss(params, tokens)), rel=1e-6)
    made = str(jax.make_jaxpr(parts)(arrange(params), tokens))
    assert (f"[2,16,{model.config.vocab_size}]" in made) == (loss == "plain")
