"""Llama 3: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases; the head tied or not as published."""

from functools import partial

import jax
from flax import nnx

from jzero.models.config import LlamaConfig
from jzero.models.layers import Attend, Embedding, linear, rotate
from jzero.models.tensor import COLUMNS, ROWS, split

_STDDEV = 0.02
# `jzero.shard(..., rules=jzero.models.llama.tensor_rules)` on a mesh whose `tensor` axis divides the heads.
tensor_rules = (
    split(COLUMNS, r"\b(q|k|v|gate|up)/kernel$"),
    split(ROWS, r"\b(o|down)/kernel$|\b(wte|lm_head)/embedding$"),
)


class LlamaAttention(nnx.Module):
    """x + attention(norm(x)), and the norm of what follows. Kernels are [in, out]."""

    def __init__(self, config: LlamaConfig, *, attend: Attend, rngs: nnx.Rngs):
        self.config, self.attend = config, attend
        kv_dim, q_dim = config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
        kernel = partial(_kernel, rngs=rngs)
        self.attn_norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        self.q, self.k, self.v = kernel(config.dim, q_dim), kernel(config.dim, kv_dim), kernel(config.dim, kv_dim)
        self.o = kernel(q_dim, config.dim)
        self.mlp_norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)

    def attended(self, x: jax.Array) -> jax.Array:
        config, heads = self.config, (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        q, k = (rotate(part, theta=config.rope_theta, scaling=config.rope_scaling) for part in (q, k))
        return self.o(self.attend(q, k, v).reshape(*x.shape[:2], -1))


class LlamaLayer(LlamaAttention):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: LlamaConfig, *, attend: Attend, rngs: nnx.Rngs):
        super().__init__(config, attend=attend, rngs=rngs)
        kernel = partial(_kernel, rngs=rngs)
        self.gate, self.up = kernel(config.dim, config.ffn_dim), kernel(config.dim, config.ffn_dim)
        self.down = kernel(config.ffn_dim, config.dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attended(self.attn_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(jax.checkpoint(_swiglu)(self.gate(y), self.up(y)))  # saves its two inputs, nothing between


def _kernel(num_in: int, num_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(num_in, num_out, stddev=_STDDEV, use_bias=False, rngs=rngs)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Shazeer: GLU Variants Improve Transformer, 2020."""
    return nnx.silu(gate) * up


class LlamaOuter(nnx.Module):
    """Everything outside the layers: tokens in, logits out."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        num_rows = config.padded_vocab_size or config.vocab_size
        self.wte = Embedding(num_rows, config.dim, stddev=_STDDEV, rngs=rngs)
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        self.lm_head = None if config.tied else Embedding(num_rows, config.dim, stddev=_STDDEV, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.wte(tokens)

    def head(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self._table.logits(x)

    def before_logits(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """What the logits are a product of, and which dim of the weight is the vocabulary."""
        x = self.norm(x)
        return x, self._table.embedding[...], 0

    @property
    def _table(self) -> Embedding:
        """[V, D]: the rows that are looked up, or rows of its own."""
        return self.wte if self.lm_head is None else self.lm_head
