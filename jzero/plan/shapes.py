"""The leaves of a GPT-2 or a Llama, counted from its config without tracing anything.

`tests/test_plan.py` holds them against the real parameters of every preset.
"""

from typing import NamedTuple

from jzero.models import GPT2Config, LlamaConfig, ModelConfig

MIN_SHARD_ELEMENTS = 1024  # jzero.shard's default


class Leaf(NamedTuple):
    """One parameter of a layer, or one outside the layers."""

    name: str
    shape: tuple[int, ...]
    repeats: int  # layers that have one; 1 outside

    @property
    def size(self) -> int:
        """Elements of one."""
        total = 1
        for dim in self.shape:
            total *= dim
        return total

    def is_split(self, num_shards: int) -> bool:
        """As the default rule decides: large enough, and some dim that divides (not the one that stacks the layers)."""
        return self.size * self.repeats >= MIN_SHARD_ELEMENTS and any(dim % num_shards == 0 for dim in self.shape)


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every parameter, layers first."""
    layer, outer = _gpt2(config) if isinstance(config, GPT2Config) else _llama(config)
    return [Leaf(name, shape, config.num_layers) for name, shape in layer.items()] + [
        Leaf(name, shape, 1) for name, shape in outer.items()
    ]


Shapes = dict[str, tuple[int, ...]]


def _gpt2(config: GPT2Config) -> tuple[Shapes, Shapes]:
    dim = config.dim
    layer: Shapes = {f"{norm}_{part}": (dim,) for norm in ("ln_1", "ln_2") for part in ("scale", "bias")}
    for name, num_in, num_out in (("qkv", dim, 3 * dim), ("proj", dim, dim), ("up", dim, 4 * dim), ("down", 4 * dim, dim)):
        layer |= {name: (num_in, num_out), f"{name}_bias": (num_out,)}
    rows = config.padded_vocab_size or config.vocab_size
    return layer, {"wte": (rows, dim), "wpe": (config.max_seq, dim), "ln_f_scale": (dim,), "ln_f_bias": (dim,)}


def _llama(config: LlamaConfig) -> tuple[Shapes, Shapes]:
    dim, q_dim, kv_dim = config.dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: Shapes = {"attn_norm": (dim,), "mlp_norm": (dim,), "q": (dim, q_dim), "k": (dim, kv_dim), "v": (dim, kv_dim)}
    layer |= {"o": (q_dim, dim), "gate": (dim, config.ffn_dim), "up": (dim, config.ffn_dim), "down": (config.ffn_dim, dim)}
    rows = config.padded_vocab_size or config.vocab_size
    outer: Shapes = {"wte": (rows, dim), "norm": (dim,)}
    return layer, outer if config.tied else outer | {"lm_head": (dim, rows)}
