"""Shapes of the models as published, by name. A preset is a value: `replace` it for anything in between."""

from dataclasses import dataclass, replace
from typing import Any

from jzero._errors import explain, suggest


@dataclass(frozen=True)
class GPT2Config:
    """Radford et al.: Language Models are Unsupervised Multitask Learners, 2019."""

    num_layers: int
    num_heads: int
    dim: int
    vocab_size: int = 50257
    max_seq: int = 1024
    padded_vocab_size: int | None = (
        None  # 50304 divides by 128 where 50257 divides by nothing; padding never enters the softmax
    )
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches its rotary frequencies beyond `original_seq` (Llama Team: The Llama 3 Herd of Models, 2024)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_seq: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Llama Team: The Llama 3 Herd of Models, 2024. `tied`: the head reads the embedding table."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    dim: int
    ffn_dim: int
    vocab_size: int = 128256
    max_seq: int = 131072
    tied: bool = False
    head_dim_override: int | None = None
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling(factor=8.0)
    padded_vocab_size: int | None = None
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.head_dim_override or self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(LlamaConfig):
    """Jiang et al.: Mixtral of Experts, 2024. Llama with `num_experts` SwiGLU blocks per layer, `top_k` of them per token."""

    num_experts: int
    top_k: int = 2
    capacity_factor: float | None = None  # per sequence; None drops nothing (`jzero.moe`)
    balance_weight: float = 0.01  # of the losses below, averaged over layers (Switch Transformers, section 2.2)
    z_weight: float = 0.001  # ST-MoE, section 3


ModelConfig = GPT2Config | LlamaConfig

PRESETS: dict[str, ModelConfig] = {
    # Bytes in, bytes out; dims that 2, 3 and 8 divide. Made for CPUs and tests.
    "gpt2-tiny": GPT2Config(num_layers=6, num_heads=6, dim=192, vocab_size=256, max_seq=256),
    "gpt2-124m": GPT2Config(num_layers=12, num_heads=12, dim=768),
    "gpt2-355m": GPT2Config(num_layers=24, num_heads=16, dim=1024),
    "gpt2-774m": GPT2Config(num_layers=36, num_heads=20, dim=1280),
    "gpt2-1.5b": GPT2Config(num_layers=48, num_heads=25, dim=1600),
    "llama-tiny": LlamaConfig(
        num_layers=6, num_heads=6, num_kv_heads=2, dim=192, ffn_dim=576, vocab_size=256, max_seq=256, rope_scaling=None
    ),
    # Llama 3.2 1B, then Llama 3.1.
    "llama-1b": LlamaConfig(
        num_layers=16, num_heads=32, num_kv_heads=8, dim=2048, ffn_dim=8192, tied=True, rope_scaling=RopeScaling(factor=32.0)
    ),
    "llama-8b": LlamaConfig(num_layers=32, num_heads=32, num_kv_heads=8, dim=4096, ffn_dim=14336),
    "llama-70b": LlamaConfig(num_layers=80, num_heads=64, num_kv_heads=8, dim=8192, ffn_dim=28672),
    "mixtral-tiny": MixtralConfig(
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        dim=192,
        ffn_dim=288,
        vocab_size=256,
        max_seq=256,
        rope_scaling=None,
        num_experts=8,
    ),
    "mixtral-8x7b": MixtralConfig(
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        dim=4096,
        ffn_dim=14336,
        vocab_size=32000,
        max_seq=32768,
        rope_theta=1e6,
        rope_scaling=None,
        num_experts=8,
    ),
    "llama-405b": LlamaConfig(num_layers=126, num_heads=128, num_kv_heads=8, dim=16384, ffn_dim=53248),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called `name`, with fields replaced.

    Raises:
        ValueError: no such preset, or no such field.
    """
    if name not in PRESETS:
        raise ValueError(
            explain(
                "jzero.models",
                "unknown model",
                found=[f"model={name!r}"],
                context=suggest(name, PRESETS),
                fix="Name a preset, or pass a GPT2Config or LlamaConfig to jzero.models.build.",
            )
        )
    return _replaced(PRESETS[name], changes)


def _replaced(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    fields = type(config).__dataclass_fields__
    unknown = [field for field in changes if field not in fields]
    if unknown:
        raise ValueError(
            explain(
                "jzero.models",
                f"{type(config).__name__} has no such field",
                found=[f"{field}={changes[field]!r}" for field in unknown],
                context=suggest(unknown[0], fields),
                fix="Leave it out or use a field that exists.",
            )
        )
    return replace(config, **changes)
