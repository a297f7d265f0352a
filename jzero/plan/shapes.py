"""The leaves of a GPT-2 or a Llama, counted from its config without tracing anything.

`tests/test_plan.py` holds them against the real parameters of every preset.
"""

import math
from functools import cache
from typing import NamedTuple

from jzero.models import GPT2Config, LlamaConfig, ModelConfig

MIN_SHARD_ELEMENTS = 1024  # jzero.shard's default


class Leaf(NamedTuple):
    """One parameter of a layer, or one outside the layers; of a model split over `tensor`, one device's piece of it."""

    name: str
    shape: tuple[int, ...]
    repeats: int  # layers that have one; 1 outside
    is_layer: bool = False
    tensor_dim: int | None = None  # that the models' tensor rules split
    num_pieces: int = 1  # over tensor

    @property
    def size(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)

    def is_split(self, num_shards: int) -> bool:
        """As the default rule decides: large enough, and some dim that divides (not the one that stacks the layers, nor the one
        that `tensor` splits).
        """
        taken = self.tensor_dim if self.num_pieces > 1 else None
        free = [size for dim, size in enumerate(self.shape) if dim != taken]
        return self.size * self.num_pieces * self.repeats >= MIN_SHARD_ELEMENTS and any(size % num_shards == 0 for size in free)

    def piece(self, num_pieces: int) -> "Leaf":
        """What one device of a `tensor` axis of that size has; the whole of a leaf that no rule splits."""
        if self.tensor_dim is None or num_pieces == 1:
            return self
        shape = tuple(size // num_pieces if dim == self.tensor_dim else size for dim, size in enumerate(self.shape))
        return self._replace(shape=shape, num_pieces=num_pieces)


@cache
def leaves(config: ModelConfig, tensor: int = 1) -> tuple[Leaf, ...]:
    """Every parameter, layers first; with `tensor` one device's piece of each. A search asks thousands of times."""
    is_gpt2 = isinstance(config, GPT2Config)
    layer, outer = _gpt2(config) if isinstance(config, GPT2Config) else _llama(config)
    columns, rows = (_GPT2_COLUMNS, _GPT2_ROWS) if is_gpt2 else (_LLAMA_COLUMNS, _LLAMA_ROWS)

    def leaf(name: str, shape: tuple[int, ...], *, is_layer: bool) -> Leaf:
        dim = len(shape) - 1 if name in columns else 0 if name in rows else None
        return Leaf(name, shape, config.num_layers if is_layer else 1, is_layer, dim).piece(tensor)

    found = [leaf(name, shape, is_layer=True) for name, shape in layer.items()]
    return (*found, *(leaf(name, shape, is_layer=False) for name, shape in outer.items()))


def tensor_sizes(config: ModelConfig) -> list[int]:
    """The sizes of a `tensor` axis that divide the heads and everything that the rules split, small ones first."""
    heads = config.num_heads if isinstance(config, GPT2Config) else math.gcd(config.num_heads, config.num_kv_heads)
    dims = [leaf.shape[leaf.tensor_dim] for leaf in leaves(config) if leaf.tensor_dim is not None]
    return [one for one in range(1, heads + 1) if heads % one == 0 and all(dim % one == 0 for dim in dims)]


# What `models.gpt2.tensor_rules` and `models.llama.tensor_rules` split: their last dim, or their first.
_GPT2_COLUMNS, _GPT2_ROWS = {"qkv", "qkv_bias", "up", "up_bias"}, {"proj", "down", "wte"}
_LLAMA_COLUMNS, _LLAMA_ROWS = {"q", "k", "v", "gate", "up", "lm_head"}, {"o", "down", "wte"}
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
