"""What is alive at the moments of a step that can be its peak: the closed form of temporaries.

Read off the buffer assignments and schedules of compiled programs (docs/log.md). Four moments compete: the head's gradient,
one layer's backward pass inside attention ("backward") and outside ("layer"), and the update. What surprises is that the first
overlaps with the next two on GPUs: the compiler leaves the head's weight gradient for later, so the gradient of the logits
waits through the backward pass of the layers.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp

from jzero import precision as precisions
from jzero import stages
from jzero.models import GPT2Config, MixtralConfig
from jzero.plan import exchanges, facts, pipelines
from jzero.plan.job import Job
from jzero.plan.shapes import Leaf, Zero
from pallas_kernels.attention import LARGE_BYTES
from pallas_kernels.attention.chunked import CHUNK

Moment = dict[str, int]  # part -> bytes per device

_FLOAT32 = 4
_TABLES = ("wte", "lm_head")


class Sizes(NamedTuple):
    """Bytes per element of what the formulas are made of."""

    compute: int
    param: int
    moment: int
    accumulate: int
    reduce: int
    reduce_once: int


def sizes(job: Job) -> Sizes:
    """From the job's precision policy."""
    return _sizes(job.precision)


@cache
def _sizes(precision: str) -> Sizes:
    policy = precisions.get(precision)
    fields = (policy.compute, policy.param, policy.moments, policy.accumulate, policy.reduce, policy.reduce_once)
    return Sizes(*(jnp.dtype(one).itemsize for one in fields))


@cache
def counted(found: tuple[Leaf, ...], zero: Zero | None = None) -> tuple[int, ...]:
    """Elements on one device of each, when the leaves that can be split are; without `zero` whole."""
    return tuple(leaf.size * leaf.repeats // (leaf.split(zero).pieces if zero else 1) for leaf in found)


def elements(found: Sequence[Leaf], zero: Zero | None = None) -> int:
    """All of them together."""
    return sum(counted(tuple(found), zero))


def moments(job: Job, *, fused_attention: bool = False, leaving: frozenset[int] = frozenset()) -> dict[str, Moment]:
    """Name -> what is alive then, at rest left out.

    Args:
      fused_attention: as if its kernel wrote no scores.
      leaving: numbers of the leaves that come at their uses, and whose gradients leave as they appear.
    """
    size, found, stage = sizes(job), pipelines.held(job), stages.get(job.stage)
    layers = tuple(leaf for leaf in found if leaf.is_layer)
    stays = tuple(leaf for index, leaf in enumerate(found) if index not in leaving)
    whole, shard = elements(stays), elements(stays, job.zero)
    all_whole, all_shard = elements(found), elements(found, job.zero)
    is_pipeline, is_sharded = job.pipe > 1, all_shard < all_whole
    scattered, gathered = stage.reduce == "use", job.stage == 3 and is_sharded
    table = size.compute * max(leaf.size for leaf in found if leaf.name in _TABLES)
    one_layer = size.compute * sum(leaf.size for leaf in layers)

    summed = size.accumulate * (shard if scattered else whole)
    always = {
        "working copy": _copied(job, size, whole, shard, elements([leaf for leaf in stays if leaf.is_layer])),
        "sum of gradients": summed if job.accumulate > 1 or is_pipeline else 0,
        **_saved_activations(job, size),
    }
    logits = size.compute * job.micro_tokens * (job.config.padded_vocab_size or job.config.vocab_size) // job.tensor
    head = {"logits": logits, "head gathered": table if gathered else 0, "gradient of the head": table}
    if job.sequence > 1:  # gathered piece by piece over `data` first; and let go before its gradient is made
        head |= {"gradient of the head": 0, "the head's piece": table // job.sequence if job.data > 1 and gathered else 0}
    backward = {
        **({"logits": logits} if _head_waits(job) else {"gradient of the head": table}),
        "gathered parameters": 2 * one_layer if gathered else 0,
        "gradients": size.compute * (shard if scattered else elements([leaf for leaf in stays if leaf.is_layer])),
        "one layer's gradients": one_layer if scattered and is_sharded else 0,
        "attention scores": fused(job) if fused_attention else scores(job, size),
        "one layer's activations": job.micro_tokens * worked(job, size),
        "masked rows": _masked(job, size),
    }
    update = {
        "gradients": summed,
        "largest leaf": size.accumulate * max(counted(found, job.zero if scattered else None)),
    }
    # Weights are gathered where they are used: inside attention's backward pass none is there, and outside no scores are. Those
    # of experts are fetched earlier: in both programs that were compiled they lie beside the scores.
    is_apart = job.sequence > 1 or (gathered and not isinstance(job.config, MixtralConfig))
    inside = {"gathered parameters": 0, "one layer's gradients": 0} if is_apart else {}
    outside = {"attention scores": 0}
    if job.sequence > 1:  # behind a second gather nothing is fetched ahead
        outside |= {"gathered parameters": one_layer, "one layer's gradients": one_layer} if gathered else inside
    found_moments = {"head": always | head, "backward": always | backward | inside, "update": update}
    return found_moments | ({"layer": always | backward | outside} if inside else {})


def _saved_activations(job: Job, size: Sizes) -> Moment:
    """Of the forward pass for the backward pass; in a pipeline of as many microbatches as it keeps, and what travels."""
    if job.pipe == 1:
        return {"saved activations": job.micro_tokens * job.config.num_layers * saved(job, size)}
    summary, _ = pipelines.costs(job, saved(job, size))
    return {"saved activations": summary["stash_bytes"] + summary["weight_stash_bytes"], "exchange": summary["exchange_bytes"]}


def saved(job: Job, size: Sizes) -> int:
    """Bytes per token and layer that the forward pass leaves for the backward pass.

    "full": the residual stream. "dots": that and the results of the weights' products. "none": everything, of which
    the norms keep float32. What has the heads or the inner dim of the MLP is split over `tensor`.
    """
    config, compute, pieces = job.config, size.compute, job.tensor
    dim = config.dim
    if isinstance(config, GPT2Config):
        dots, everything = 2 * dim + 7 * dim // pieces, 4 * dim + 10 * dim // pieces
        return {"full": dim * compute, "dots": dots * compute, "none": everything * compute + 6 * dim * _FLOAT32}[job.remat]
    heads, kv = config.num_heads * config.head_dim // pieces, 2 * config.num_kv_heads * config.head_dim // pieces
    if isinstance(config, MixtralConfig):  # an expert's product is an operation of its own, which "dots" does not know
        inner = exchanges.num_rows(job) * (3 * config.ffn_dim // pieces + 2 * dim) // job.micro_tokens
        dots, everything = 2 * dim + heads + kv + config.num_experts, 2 * heads + 2 * kv + 4 * dim + inner
        return {"full": dim * compute, "dots": dots * compute, "none": everything * compute + 4 * dim * _FLOAT32}[job.remat]
    dots = 2 * dim + heads + kv + 2 * config.ffn_dim // pieces
    everything = 2 * heads + 2 * kv + 3 * config.ffn_dim // pieces + 4 * dim
    return {"full": dim * compute, "dots": dots * compute, "none": everything * compute + 4 * dim * _FLOAT32}[job.remat]


def scores(job: Job, size: Sizes) -> int:
    """Attention's scores when most of them are alive: plain attention's backward pass, recomputed; or one block of them."""
    if _is_by_blocks(job):
        return blocked(job)
    each = job.micro_sequences * (job.config.num_heads // job.tensor) * _pairs(job)
    if facts.is_tpu(job.parsed):
        return (_FLOAT32 + size.compute) * each  # its fusions write the weights and their gradient, nothing between
    if isinstance(job.config, GPT2Config):
        return 4 * size.compute * each
    # Grouped heads: the softmax in float32 is written too, where it is not one of the three already.
    return (3 * size.compute + (_FLOAT32 if size.compute != _FLOAT32 else 0)) * each


def _is_by_blocks(job: Job) -> bool:
    """As `pallas_kernels.attention` chooses, by one example's heads that it is given; a ring has blocks of its own."""
    is_ring = job.sequence > 1 and job.attention_kind == "ring"
    heads = job.config.num_heads // (job.sequence * job.tensor if job.sequence > 1 else 1)
    return not is_ring and 4 * heads * job.seq**2 > LARGE_BYTES


def blocked(job: Job) -> int:
    """Long sequences go block by block: three blocks of float32 scores, and the gradients of q, k and v summed in float32."""
    config = job.config
    heads = config.num_heads + 2 * getattr(config, "num_kv_heads", config.num_heads)
    scores = 3 * job.micro_sequences * (config.num_heads // job.sequence) * CHUNK**2
    return _FLOAT32 * (scores + job.micro_tokens * heads * config.head_dim) // job.tensor


def _pairs(job: Job) -> int:
    """Of positions that meet at once, for all heads: those of the device's heads, or in a ring those of one block."""
    if job.attention_kind == "ulysses":
        return job.seq**2 // job.sequence
    return (job.seq // (2 * job.sequence)) ** 2


def fused(job: Job) -> int:
    """What a fused kernel's backward pass has instead of scores: the query's gradient, summed in float32 (Dao, 2023)."""
    return _FLOAT32 * job.micro_tokens * job.config.num_heads * job.config.head_dim // job.tensor


def worked(job: Job, size: Sizes) -> int:
    """Bytes per token of one layer's backward pass, its scores apart."""
    config = job.config
    if isinstance(config, GPT2Config):
        return (4 + 12 // job.tensor) * config.dim * size.compute if job.tensor > 1 else 16 * config.dim * size.compute
    if isinstance(config, MixtralConfig):
        rows = exchanges.num_rows(job) / job.micro_tokens
        return int((rows * (2 * config.ffn_dim // job.tensor + 2 * config.dim) + 8 * config.dim) * size.compute)
    return (2 * config.ffn_dim // job.tensor + 8 * config.dim) * size.compute


def _masked(job: Job, size: Sizes) -> int:
    """On GPUs a ragged product is dense, over all rows for each expert here: hidden rows and their gradient, masked."""
    config = job.config
    if not isinstance(config, MixtralConfig) or config.capacity_factor is not None or facts.is_tpu(job.parsed):
        return 0
    num_here = config.num_experts // job.expert
    return 2 * num_here * exchanges.num_rows(job) * config.ffn_dim // job.tensor * size.compute if num_here > 1 else 0


def _head_waits(job: Job) -> bool:
    """Whether the head's weight gradient is left for after the layers: on GPUs, but not inside a loop over microbatches that
    reduces nothing, where the compiler orders for memory and not to hide collectives.
    """
    return not facts.is_tpu(job.parsed) and (job.accumulate == 1 or job.stage >= 2) and job.pipe == 1


def _copied(job: Job, size: Sizes, whole: int, shard: int, layers: int) -> int:
    """The parameters as the step works with them, where they are not the ones at rest; at stage 3 what is gathered from."""
    if job.stage == 3 and job.zero != Zero():
        return size.compute * shard if size.compute != size.param else 0
    if size.compute != size.param or (job.stage > 0 and job.zero != Zero()):
        return size.compute * whole
    # Float32 products on a TPU are one pass in bfloat16: the weights are cast once, outside the loop over the layers.
    return 2 * layers if facts.is_tpu(job.parsed) and size.compute == _FLOAT32 else 0
