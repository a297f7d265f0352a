"""The leaves of a GPT-2, a Llama or a Mixtral, counted from its config without tracing anything.

`tests/test_plan.py` holds them against the real parameters of every preset.
"""

import math
from functools import cache
from typing import NamedTuple

from jzero.models import GPT2Config, LlamaConfig, MixtralConfig, ModelConfig

MIN_SHARD_ELEMENTS = 1024  # jzero.shard's default


class Zero(NamedTuple):
    """Sizes of the axes that ZeRO shards over."""

    data: int = 1
    expert: int = 1
    sequence: int = 1


class Split(NamedTuple):
    """How ZeRO splits a leaf."""

    axes: tuple[str, ...] = ()  # of the batch axes; () where it is whole over them
    num: int = 1  # their product
    over_sequence: int = 1
    dim: int | None = None  # that the batch axes split
    sequence_dim: int | None = None

    @property
    def pieces(self) -> int:
        return self.num * self.over_sequence


class Leaf(NamedTuple):
    """One parameter of a layer, or one outside; of a model split over `tensor` or `expert` one device's piece of it."""

    name: str
    shape: tuple[int, ...]
    repeats: int  # layers that have one; 1 outside
    is_layer: bool = False
    tensor_dim: int | None = None  # that the models' tensor rules split
    num_pieces: int = 1  # over tensor
    expert_dim: int | None = None  # that the expert rules split
    num_groups: int = 1  # over expert

    @property
    def size(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)

    @property
    def is_experts(self) -> bool:
        """Whether devices of `expert` have different ones."""
        return self.num_groups > 1

    def split(self, zero: Zero) -> Split:
        """As the default rule decides (`jzero.rules.zero`): large enough, and the largest dim that divides (not the one that
        stacks layers, nor one that `tensor` or `expert` splits) over `data`, with `expert` if that divides too; then another
        dim, or what is left of the same, over `sequence`.
        """
        return _split(self, zero)

    def is_split(self, num_shards: int) -> bool:
        """Whether `data` alone splits it."""
        return self.split(Zero(num_shards)).num > 1

    def piece(self, num_pieces: int, num_groups: int = 1) -> "Leaf":
        """What one device of a `tensor` and an `expert` axis of these sizes has; the whole of a leaf that no rule splits."""
        found = self
        if self.tensor_dim is not None and num_pieces > 1:
            found = found._replace(shape=_cut(found.shape, self.tensor_dim, num_pieces), num_pieces=num_pieces)
        if self.expert_dim is not None and num_groups > 1:
            found = found._replace(shape=_cut(found.shape, self.expert_dim, num_groups), num_groups=num_groups)
        return found


@cache
def _split(leaf: Leaf, zero: Zero) -> Split:
    taken = {leaf.tensor_dim} if leaf.num_pieces > 1 else set()
    taken |= {leaf.expert_dim} if leaf.num_groups > 1 else set()
    if leaf.size * leaf.num_pieces * leaf.num_groups * leaf.repeats < MIN_SHARD_ELEMENTS:
        return Split()
    both = zero.expert if leaf.num_groups == 1 else 1
    found = Split()
    for axes, num in (("data", "expert"), zero.data * both), (("data",), zero.data):
        dim = _largest(leaf.shape, taken, num) if num > 1 else None
        if dim is not None:
            sizes = {"data": zero.data, "expert": both if len(axes) > 1 else 1}
            found = Split(tuple(axis for axis in axes if sizes[axis] > 1), num, dim=dim)
            break
    if zero.sequence == 1:
        return found
    dim = _largest(leaf.shape, taken | {found.dim}, zero.sequence)
    if dim is None and found.dim is not None and leaf.shape[found.dim] % (found.num * zero.sequence) == 0:
        dim = found.dim
    return found if dim is None else found._replace(over_sequence=zero.sequence, sequence_dim=dim)


def _largest(shape: tuple[int, ...], taken: set[int | None], num: int) -> int | None:
    fits = [dim for dim, size in enumerate(shape) if dim not in taken and size % num == 0]
    return max(fits, key=lambda dim: (shape[dim], dim), default=None)


def _cut(shape: tuple[int, ...], dim: int, num: int) -> tuple[int, ...]:
    return (*shape[:dim], shape[dim] // num, *shape[dim + 1 :])


@cache
def leaves(config: ModelConfig, tensor: int = 1, expert: int = 1) -> tuple[Leaf, ...]:
    """Every parameter, layers first; with `tensor` and `expert` one device's piece. A search asks thousands of times."""
    is_gpt2 = isinstance(config, GPT2Config)
    layer, outer = _gpt2(config) if isinstance(config, GPT2Config) else _llama(config)
    columns, rows = (_GPT2_COLUMNS, _GPT2_ROWS) if is_gpt2 else (_LLAMA_COLUMNS, _LLAMA_ROWS)

    def leaf(name: str, shape: tuple[int, ...], *, is_layer: bool) -> Leaf:
        inner = name.removeprefix(EXPERTS)
        dim = len(shape) - 1 if inner in columns else len(shape) - 2 if inner in rows else None
        found = Leaf(name, shape, config.num_layers if is_layer else 1, is_layer, dim, expert_dim=0 if inner != name else None)
        return found.piece(tensor, expert)

    found = [leaf(name, shape, is_layer=True) for name, shape in layer.items()]
    return (*found, *(leaf(name, shape, is_layer=False) for name, shape in outer.items()))


def is_tied(leaf: Leaf, config: ModelConfig) -> bool:
    """Whether it is the embedding and the head."""
    return leaf.name == "wte" and (isinstance(config, GPT2Config) or config.tied)


def tensor_sizes(config: ModelConfig) -> list[int]:
    """The sizes of a `tensor` axis that divide the heads and everything that the rules split, small ones first."""
    heads = config.num_heads if isinstance(config, GPT2Config) else math.gcd(config.num_heads, config.num_kv_heads)
    dims = [leaf.shape[leaf.tensor_dim] for leaf in leaves(config) if leaf.tensor_dim is not None]
    return [one for one in range(1, heads + 1) if heads % one == 0 and all(dim % one == 0 for dim in dims)]


# What `models.gpt2.tensor_rules`, `models.llama.tensor_rules` and Mixtral's split: their last dim, or their last but one.
_GPT2_COLUMNS, _GPT2_ROWS = {"qkv", "qkv_bias", "up", "up_bias"}, {"proj", "down", "wte"}
_LLAMA_COLUMNS, _LLAMA_ROWS = {"q", "k", "v", "gate", "up"}, {"o", "down", "wte", "lm_head"}
EXPERTS = "experts/"
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
    layer["o"] = (q_dim, dim)
    mlp: Shapes = {"gate": (dim, config.ffn_dim), "up": (dim, config.ffn_dim), "down": (config.ffn_dim, dim)}
    if isinstance(config, MixtralConfig):
        layer["router"] = (dim, config.num_experts)
        mlp = {f"{EXPERTS}{name}": (config.num_experts, *shape) for name, shape in mlp.items()}
    rows = config.padded_vocab_size or config.vocab_size
    outer: Shapes = {"wte": (rows, dim), "norm": (dim,)}
    return layer | mlp, outer if config.tied else outer | {"lm_head": (rows, dim)}
