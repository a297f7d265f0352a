"""Mixtral: Llama whose MLP is a mixture of experts. Jiang et al.: Mixtral of Experts, 2024."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jzero import moe
from jzero._errors import explain
from jzero.models.config import MixtralConfig
from jzero.models.layers import Attend, linear
from jzero.models.llama import LlamaAttention, LlamaOuter
from jzero.models.tensor import placed, split

_STDDEV = 0.02
# `jzero.shard(..., rules=jzero.models.mixtral.expert_rules)` on a mesh whose `expert` axis divides the experts.
expert_rules = (split(3, r"\bexperts/(gate|up|down)$", axis="expert"),)
# The same with each expert and everything else split over `tensor` too, whose size divides the heads.
tensor_rules = (
    placed(r"\bexperts/(gate|up)$", {3: "expert", 1: "tensor"}),
    placed(r"\bexperts/down$", {3: "expert", 2: "tensor"}),
    split(1, r"\b(q|k|v)/kernel$"),
    split(2, r"\bo/kernel$|\b(wte|lm_head)/embedding$"),
)


class Tokens(NamedTuple):
    """What travels from layer to layer: activations, and the routers' losses so far."""

    x: jax.Array  # [B, T, D]
    losses: jax.Array  # float32[2]: balance and z


class Experts(nnx.Module):
    """gate and up[E, D, F], down[E, F, D]."""

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        def weights(num_in: int, num_out: int) -> nnx.Param:
            return nnx.Param(_STDDEV * jax.random.normal(rngs.params(), (config.num_experts, num_in, num_out)))

        self.gate, self.up = weights(config.dim, config.ffn_dim), weights(config.dim, config.ffn_dim)
        self.down = weights(config.ffn_dim, config.dim)


class MixtralLayer(LlamaAttention):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: MixtralConfig, *, attend: Attend, rngs: nnx.Rngs):
        super().__init__(config, attend=attend, rngs=rngs)
        self.router = linear(config.dim, config.num_experts, stddev=_STDDEV, use_bias=False, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.top_k, self.capacity_factor = config.top_k, config.capacity_factor

    def __call__(self, tokens: Tokens) -> Tokens:
        x = tokens.x + self.attended(self.attn_norm(tokens.x))
        y = self.mlp_norm(x)
        routing = moe.route(y, self.router.kernel[...], top_k=self.top_k)
        weights = (self.experts.gate[...], self.experts.up[...], self.experts.down[...])
        x = x + moe.swiglu(y, routing, *weights, capacity_factor=self.capacity_factor)
        return Tokens(x, tokens.losses + jnp.stack([routing.balance, routing.z]))


class MixtralOuter(LlamaOuter):
    """Everything outside the layers: tokens in, logits out."""

    def embed(self, tokens: jax.Array) -> Any:
        return Tokens(super().embed(tokens), jnp.zeros(2, jnp.float32))

    def head(self, x: Any) -> jax.Array:
        return super().head(x.x)

    def before_logits(self, x: Any) -> tuple[jax.Array, jax.Array, int]:
        return super().before_logits(x.x)


def routing_loss(config: MixtralConfig, tokens: Tokens) -> jax.Array:
    """The routers' losses, averaged over layers."""
    balance, z = tokens.losses / config.num_layers
    return config.balance_weight * balance + config.z_weight * z


def check(config: MixtralConfig) -> None:
    """Raise for experts that no router can choose."""
    if not 1 <= config.top_k <= config.num_experts:
        found, fix = [f"top_k={config.top_k}"], f"Use 1 to {config.num_experts}."
        raise ValueError(explain("jzero.models", f"a token goes to 1 to {config.num_experts} experts", found=found, fix=fix))
    if config.capacity_factor is not None:
        moe.capacity_of(config.capacity_factor, num_tokens=config.max_seq, top_k=config.top_k, num_experts=config.num_experts)
