"""GPT-2: learned positions, pre-norm LayerNorm with bias, GELU in its tanh form, the head tied to the embedding."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jzero.models.config import GPT2Config
from jzero.models.layers import Attend, Embedding, linear
from jzero.models.tensor import COLUMNS, ROWS, split

_STDDEV = 0.02  # openai/gpt-2, model.py: w_init_stdev
# `jzero.shard(..., rules=jzero.models.gpt2.tensor_rules)` on a mesh whose `tensor` axis divides the heads.
tensor_rules = (
    split(COLUMNS, r"\b(qkv|up)/(kernel|bias)$"),
    split(ROWS, r"\b(proj|down)/kernel$|\bwte/embedding$"),
)
# Inside a pipeline: query, key and value, in one matrix whose pieces do not fall on heads, stay whole. An exchange would stand
# under a condition in which pipe stages differ, where simulated devices wait for ever for a permute that all must join.
pipeline_tensor_rules = (split(COLUMNS, r"\bup/(kernel|bias)$"), tensor_rules[1])


class GPT2Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Kernels are [in, out], as published."""

    def __init__(self, config: GPT2Config, *, attend: Attend, rngs: nnx.Rngs):
        dim, residual = config.dim, _STDDEV / math.sqrt(2 * config.num_layers)  # section 2.3 of the paper
        self.num_heads, self.attend = config.num_heads, attend
        self.ln_1 = nnx.LayerNorm(dim, epsilon=config.norm_eps, rngs=rngs)
        self.qkv = linear(dim, 3 * dim, stddev=_STDDEV, use_bias=True, rngs=rngs)
        self.proj = linear(dim, dim, stddev=residual, use_bias=True, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(dim, epsilon=config.norm_eps, rngs=rngs)
        self.up = linear(dim, 4 * dim, stddev=_STDDEV, use_bias=True, rngs=rngs)
        self.down = linear(4 * dim, dim, stddev=residual, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self._heads(self.qkv(self.ln_1(x)))
        x = x + self.proj(self.attend(q, k, v).reshape(x.shape))
        # Nothing of the GELU is saved but its input: its backward then runs twice as fast on CPU, and memory falls everywhere.
        return x + self.down(jax.checkpoint(nnx.gelu)(self.up(self.ln_2(x))))

    def _heads(self, qkv: jax.Array) -> list[jax.Array]:
        """q, k and v[B, T, H, C]. In a pipeline told apart on a dim of their own, over which no axis can be split."""
        heads = (*qkv.shape[:2], self.num_heads, -1)
        if "pipe" in jax.sharding.get_abstract_mesh().manual_axes:
            return list(jnp.unstack(qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1), axis=2))
        return [part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1)]


class GPT2Outer(nnx.Module):
    """Everything outside the layers: tokens in, logits out."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.wte = Embedding(config.padded_vocab_size or config.vocab_size, config.dim, stddev=_STDDEV, rngs=rngs)
        self.wpe = Embedding(config.max_seq, config.dim, stddev=_STDDEV, rngs=rngs)
        self.ln_f = nnx.LayerNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.wte(tokens) + self.wpe.embedding[...][: tokens.shape[1]]

    def head(self, x: jax.Array) -> jax.Array:
        return self.wte.logits(self.ln_f(x))

    def before_logits(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """What the logits are a product of, and which dim of the weight is the vocabulary."""
        return self.ln_f(x), self.wte.embedding[...], 0
