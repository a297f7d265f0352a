"""Where examples meet in models as their libraries write them: linen, nnx, convolutions, cuDNN, and the sizes of a 405B."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from reduction_losses import B, D, T, V, ce, make_batch, verdict_of

from jzero.reduction import (
    analyze,
    explain_mixed,
    is_mean,
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, mask):
        h = h + nn.MultiHeadDotProductAttention(num_heads=1)(nn.LayerNorm()(h), mask=mask)
        return h + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.RMSNorm()(h))))


class LinenGPT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(V, D)(tokens) + self.param("positions", nn.initializers.normal(), (T, D))
        h = nn.Dropout(0.1, deterministic=False)(Block()(h, nn.make_causal_mask(tokens)))
        return nn.Dense(V)(h)


def test_linen_attention():
    model = LinenGPT()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.eval_shape(model.init, keys, jnp.zeros((1, T), jnp.int32))

    def loss(p, key, b):
        return ce(model.apply(p, b["t"], rngs={"dropout": key})[:, :-1], b["t"][:, 1:]).mean()

    state = verdict_of(loss, params, {"t": make_batch()["t"]}, rng=jax.eval_shape(lambda: keys["dropout"])).outputs[0]
    assert is_mean(state), explain_mixed(state)


class NnxGPT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(1, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        h = h + self.attention(self.norm(h), mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(h + nnx.silu(self.up(h)))


def test_nnx_gpt():
    graph, params = nnx.split(nnx.eval_shape(lambda: NnxGPT(nnx.Rngs(0))))

    def loss(p, b):
        return ce(nnx.merge(graph, p)(b["t"])[:, :-1], b["t"][:, 1:]).mean()

    state = verdict_of(loss, params, {"t": make_batch()["t"]}).outputs[0]
    assert is_mean(state), explain_mixed(state)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        h = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(images))
        h = nn.max_pool(nn.avg_pool(nn.relu(h), (2, 2), strides=(2, 2)), (2, 2), strides=(2, 2))
        return nn.Dense(V)(h.reshape(h.shape[0], -1))


def test_conv_net_of_bfloat16():
    model, images = ConvNet(), jax.ShapeDtypeStruct((B, 8, 8, 3), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    loss = lambda p, b: ce(model.apply(p, b[0]), b[1]).mean()
    state = verdict_of(loss, params, (images, make_batch()["y"])).outputs[0]
    assert is_mean(state), explain_mixed(state)


def test_abstract_shapes_of_a_405b_model():
    layers, width, length, vocabulary = 126, 16384, 8192, 128256
    shapes = {"embed": (vocabulary, width), "up": (layers, width, 53248), "down": (layers, 53248, width)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def loss(p, tokens):
        h, _ = lax.scan(lambda h, w: (h + jax.nn.silu(h @ w[0]) @ w[1], None), p["embed"][tokens], (p["up"], p["down"]))
        return ce((h @ p["embed"].T).astype(jnp.float32), tokens).mean()

    assert is_mean(verdict_of(loss, params, jax.ShapeDtypeStruct((512, length), jnp.int32)).outputs[0])


def test_cudnn_attention_keeps_examples_apart(monkeypatch):
    """It traces without a GPU once the look at the library's version is answered; its programs are opaque to the walk."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)

    def loss(w, x):
        q = (x @ w).reshape(x.shape[0], 64, 2, 64)
        out = jax.nn.dot_product_attention(q, q, q, is_causal=True, implementation="cudnn")
        return [jnp.mean(out.astype(jnp.float32) ** 2)]

    args = [jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, 64, 128), jnp.bfloat16)]
    verdict = analyze(loss, args, [None, 0])
    assert is_mean(verdict.outputs[0]), verdict.findings
