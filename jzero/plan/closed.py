"""The closed form: what a step of a model needs and moves, from its config alone. Nothing is traced; it takes milliseconds.

Temporaries are the largest of three moments of the step, for not all of them live at once; `docs/plan.md` says how far each
was off.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero import precision as precisions
from jzero import stages
from jzero.audit import moved
from jzero.models import GPT2Config, ModelConfig
from jzero.plan.job import Job
from jzero.plan.shapes import Leaf, leaves

_TABLES = ("wte", "lm_head")
# Tables in the compute dtype that live while the head's gradient is made: read off four compiled programs (docs/plan.md).
_HEAD_GATHERED, _HEAD_WHOLE = 2.5, 3.0


class Memory(NamedTuple):
    """Bytes per device."""

    at_rest: dict[str, int]  # role -> bytes: params, opt_state, batch
    live: dict[str, int]  # the parts of the moment that needs most
    moment: str  # "head", "backward" or "update"

    @property
    def temp_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_rest.values()) + self.temp_bytes

    @property
    def parts(self) -> dict[str, int]:
        """Everything that makes the peak, the largest first."""
        named = {f"{role} at rest": size for role, size in self.at_rest.items()} | self.live
        return dict(sorted(named.items(), key=lambda item: -item[1]))


class _Sizes(NamedTuple):
    """What the formulas are made of."""

    compute: int
    param: int
    moment: int
    accumulate: int
    reduce: int
    reduce_once: int


def memory(job: Job) -> Memory:
    """Bytes at rest by role, and the temporaries of the moment that needs most."""
    size, found = _sizes(job), leaves(job.config)
    stage = stages.get(job.stage)
    whole, shard = _elements(found, 1), _elements(found, job.data)
    rest = {
        "params": size.param * (shard if stage.shard_params else whole),
        "opt_state": 2 * size.moment * (shard if stage.shard_opt_state else whole),
        "batch": 4 * job.accumulate * job.micro_sequences * (job.seq + 1),
    }
    copy = {"working copy": 0 if _needs_no_copy(job, size) else size.compute * whole}
    if job.stage == 3:
        copy = {"gathered parameters": size.compute * _one_layer(found) * (2 if job.data > 1 else 0)}
    summed = size.accumulate * (shard if stage.reduce == "use" else whole)
    sums = {"sum of gradients": summed if job.accumulate > 1 else 0}
    saved = {"saved activations": _saved(job, size)}
    table = size.compute * max(leaf.size for leaf in found if leaf.name in _TABLES)
    head = int((_HEAD_GATHERED if job.stage == 3 else _HEAD_WHOLE) * table)
    outside = {} if job.stage == 3 else copy  # no layer is gathered while the head works
    backward = {"gradients": size.compute * (shard if stage.reduce == "use" else whole)}
    if job.stage >= 2 and job.data > 1:
        backward["one layer's gradients"] = size.compute * _one_layer(found)
    update = {
        "gradients": summed,
        "largest leaf": size.accumulate * max(one.size * one.repeats for one in found) // _parts(job),
    }
    moments = {
        "head": outside | sums | saved | {"logits": _logits(job, size), "head and its gradient": head},
        "backward": copy | sums | backward | saved | {"one layer's activations": _layer(job, size)},
        "update": update,
    }
    name = max(moments, key=lambda one: sum(moments[one].values()))
    return Memory(rest, {part: amount for part, amount in moments[name].items() if amount}, name)


def wire(job: Job) -> dict[str, dict[str, int]]:
    """Axis -> kind -> bytes per device and step, with the ring algorithm; DESIGN's table of stages, leaf by leaf."""
    size, stage, k = _sizes(job), stages.get(job.stage), job.accumulate
    table: dict[str, dict[str, int]] = {}

    def add(axis: str, kind: str, amount: int, members: int) -> None:
        if members > 1 and amount:
            kinds = table.setdefault(axis, {})
            kinds[kind] = kinds.get(kind, 0) + moved(kind, amount, members)

    both = "+".join(job.mesh)
    for leaf in leaves(job.config):
        total = leaf.size * leaf.repeats
        if stage.gather == "never" or not leaf.is_split(job.data):
            add(both, "all-reduce", size.reduce_once * total, job.num_devices)
            continue
        uses = k * (2 if leaf.repeats > 1 else 1) if stage.gather == "use" else 1
        add("data", "all-gather", size.compute * total * uses, job.data)
        once = stage.reduce == "step"
        add("data", "reduce-scatter", (size.reduce_once if once else size.reduce * k) * total, job.data)
        add("replica", "all-reduce", size.reduce_once * total // job.data, job.replica)
    return table


def flops_per_token(config: ModelConfig, seq: int) -> float:
    """6 N + 12 L d T, as the models and every published MFU count: `jzero.models.FLOPS_FORMULA`."""
    padding = (getattr(config, "padded_vocab_size", None) or config.vocab_size) - config.vocab_size
    count = sum(leaf.size * leaf.repeats for leaf in leaves(config) if leaf.name not in ("wpe", *_lookups(config)))
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * (count - padding * config.dim) + attention * seq


def num_params(config: ModelConfig) -> int:
    """With the padding of the vocabulary."""
    return _elements(leaves(config), 1)


def _lookups(config: ModelConfig) -> tuple[str, ...]:
    """Tables that are only looked up: they multiply nothing."""
    return () if isinstance(config, GPT2Config) or config.tied else ("wte",)


def _sizes(job: Job) -> _Sizes:
    policy = precisions.get(job.precision)
    fields = (policy.compute, policy.param, policy.moments, policy.accumulate, policy.reduce, policy.reduce_once)
    return _Sizes(*(jnp.dtype(one).itemsize for one in fields))


def _elements(found: list[Leaf], num_shards: int) -> int:
    """On one device, when the leaves that can be split are."""
    return sum(leaf.size * leaf.repeats // (num_shards if leaf.is_split(num_shards) else 1) for leaf in found)


def _one_layer(found: list[Leaf]) -> int:
    return sum(leaf.size for leaf in found if leaf.repeats > 1)


def _needs_no_copy(job: Job, size: _Sizes) -> bool:
    return size.compute == size.param and (job.stage == 0 or job.data == 1)


def _parts(job: Job) -> int:
    return job.data if job.stage >= 2 else 1


def _saved(job: Job, size: _Sizes) -> int:
    """What the forward pass leaves for the backward pass, over all layers."""
    return size.compute * job.micro_tokens * job.config.num_layers * _units(job.config, job.remat)


def _units(config: ModelConfig, remat: str) -> int:
    """Elements saved per token and layer: the residual stream alone ("full"), or everything ("none").

    "dots" is planned as "full": the models' matmuls have a derivative of their own (`jzero.models.matmul`), which jax's policy
    does not see, so it saves none of them; the temporaries of the two compiled programs are the same to the byte.
    """
    dim, heads = config.dim, config.num_heads * config.head_dim
    if isinstance(config, GPT2Config):
        return 23 * dim if remat == "none" else dim
    kv = 2 * config.num_kv_heads * config.head_dim
    # Everything: the matmuls' results, norms' inputs in float32 and outputs, attention's output, what meets `down`.
    return 2 * heads + kv + 3 * config.ffn_dim + 10 * dim if remat == "none" else dim


def _layer(job: Job, size: _Sizes) -> int:
    """The working set of one layer's backward pass: its recomputed activations, and attention's scores, twice in float32."""
    scores = 2 * 4 * job.micro_sequences * job.config.num_heads * job.seq**2
    units = 4 * job.config.dim if job.remat == "none" else _matmul_units(job.config)
    return scores + size.compute * job.micro_tokens * units


def _matmul_units(config: ModelConfig) -> int:
    """Elements per token of a layer's matmul results and its input."""
    if isinstance(config, GPT2Config):
        return 10 * config.dim
    return 3 * config.dim + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 2 * config.ffn_dim


def _logits(job: Job, size: _Sizes) -> int:
    """Logits and their gradient in the compute dtype; the float32 between them is never written."""
    rows: Any = job.config.padded_vocab_size or job.config.vocab_size
    return 2 * size.compute * job.micro_tokens * rows
