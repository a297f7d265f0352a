"""What tokens send: to the other pieces of their sequence, and to their experts. Bytes per device and step."""

import math

from jzero.audit import moved
from jzero.models import GPT2Config, MixtralConfig
from jzero.moe.experts import capacity_of
from jzero.plan.job import Job

_FLOAT32 = 4
Table = dict[str, dict[str, int]]


def wire(job: Job, compute: int) -> Table:
    """Axis -> kind -> bytes; `compute`: bytes of a number on the wire."""
    table: Table = {}
    if job.sequence > 1:
        table["sequence"] = _sequence(job, compute)
    if job.expert > 1:
        table["expert"] = {"all-to-all": _expert(job, compute)}
    return table


def _sequence(job: Job, compute: int) -> dict[str, int]:
    """Attention's exchanges in every layer (`jzero.attention`), forward, backward and, where the layer is computed again,
    forward once more; and the embedding's gradient, for which rows of all positions are brought together.
    """
    config, num = job.config, job.sequence
    turns, again = job.config.num_layers * job.accumulate, 0 if job.remat == "none" else 1
    heads = config.num_heads // job.tensor
    kv = heads if isinstance(config, GPT2Config) else config.num_kv_heads // job.tensor
    one_head = job.micro_tokens * config.head_dim * compute
    rows = job.micro_sequences * job.seq * config.dim * compute * job.accumulate
    found = {"all-gather": moved("all-gather", rows, num)}
    if job.attention_kind == "ulysses":
        copies = num // math.gcd(kv, num)  # of each key-value head, so that all devices have those that they read
        around = (2 * heads + 2 * kv * copies) * one_head
        return found | {"all-to-all": moved("all-to-all", (2 + again) * turns * around, num)}
    keys, around = 2 * kv * one_head, (2 * heads + 2 * kv) * one_head  # `around`: chunks that change places, for the balance
    of_keys = keys // compute * _FLOAT32  # their gradients
    dots = heads * job.micro_tokens * _FLOAT32
    forward = (num - 1) * keys + around
    backward = (num - 1) * (keys + of_keys) + around + dots
    return found | {"collective-permute": turns * ((1 + again) * forward + backward)}


def _expert(job: Job, compute: int) -> int:
    """Rows to their experts and back, and their gradients (`jzero.moe`); blocks have room for all that one device may get."""
    config = job.config
    assert isinstance(config, MixtralConfig)
    times = 2 if job.remat == "none" else 3
    rows = 2 * times * num_rows(job) * config.dim * compute
    counts = (times - 1) * _FLOAT32 * config.num_experts if config.capacity_factor is None else 0
    return moved("all-to-all", rows + counts, job.expert) * config.num_layers * job.accumulate


def num_rows(job: Job) -> int:
    """Rows of a microbatch that one device's experts compute, empty ones too: as many as it exchanges."""
    config = job.config
    assert isinstance(config, MixtralConfig)
    tokens = job.micro_sequences * job.seq
    if config.capacity_factor is not None:
        each = capacity_of(
            config.capacity_factor, num_tokens=job.seq, top_k=config.top_k, num_experts=config.num_experts
        )  # fmt: skip
        return config.num_experts * job.micro_sequences * each
    return job.expert * tokens * min(config.top_k, config.num_experts // job.expert)
