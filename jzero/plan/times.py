"""The closed form of time: a roofline per device, from the facts of the device and the traffic of the stage."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from jzero import precision as precisions
from jzero.models import MixtralConfig
from jzero.plan import closed, exchanges, facts, hosts, offloads, pipelines
from jzero.plan.job import AXES, Job
from jzero.plan.transfers import Transfer, transfer

# Of the forward pass (a third of the model's FLOPs) what the backward pass computes again: weights' products, attention.
# Attention's scores are never saved (`jzero.attention`); cuDNN's kernel needs half of its forward pass to have them.
_RECOMPUTED = {"none": (0.0, 0.0), "dots": (0.0, 1.0), "full": (1.0, 1.0)}
_SCORES_AGAIN = {"plain": 1.0, "cudnn": 0.5}
_UPDATE_BYTES = 28  # fp32 AdamW: reads parameter, gradient and two moments, writes three
_WAITED = "all-to-all"  # of heads or of tokens: nothing goes on without them


class Times(NamedTuple):
    """Seconds per step, what they are made of, and the rates that follow."""

    compute_s: float
    wire_s: dict[str, float]  # axis -> seconds
    update_s: float
    step_s: float
    tokens_per_s_per_device: float
    mfu: float
    bound: str  # "compute", "wire", "host link", "host" (its processors) or "disk"
    transfer: Transfer = Transfer()  # of what rests off the device

    def to_dict(self) -> dict[str, object]:
        found = self._asdict() | {"transfer": self.transfer.to_dict()}
        return found if self.transfer.alone_s else {name: value for name, value in found.items() if name != "transfer"}


def times(job: Job) -> Times:
    """How long one step takes if matmuls and wires reach what they reach alone (`facts.MATMUL_FRACTION`, `WIRE_FRACTION`).

    Gathers and reductions at each use hide behind the layer's matmuls, and a ring's permutes behind its blocks, so the longer
    of the two counts; those once a step stand alone, and so do sums over `tensor` and all-to-alls: the next product waits.
    Every tick of a pipeline lasts as long as its slowest stage, which the head makes the last one. What rests off the device
    comes and goes as `jzero.plan.transfers` says. Nothing else is lost here: kernels, input, stragglers. So it is a good run's
    time and not an average one's.
    """
    device = facts.FACTS[job.parsed.model]
    tokens = job.batch * job.seq / job.num_devices
    useful, again = closed.flops_per_token(job.config, job.seq) * tokens, (_recomputed(job) + _beyond(job)) * tokens
    peak = device.peak[jnp.dtype(precisions.get(job.precision).compute).name]
    compute_s = (useful + again) / (peak * facts.MATMUL_FRACTION) * _lockstep(job)
    moved = closed.wire(job)
    wires = {axis: sum(kinds.values()) / _bandwidth(job, axis) for axis, kinds in moved.items()}
    waited_s = sum(
        (sum(kinds.values()) if axis == "tensor" else kinds.get(_WAITED, 0)) / _bandwidth(job, axis)
        for axis, kinds in moved.items()
    )
    rested = offloads.resting(job)
    found = offloads.away(job)
    elsewhere = sum(trip.load.moved + trip.load.beside for trip in found.trips if trip.by_host) if found else 0
    update_s = (sum(map(sum, rested.values())) - elsewhere) / 12 * _UPDATE_BYTES / device.memory_bandwidth
    hidden = job.stage == 3 or (job.stage == 2 and job.accumulate > 1)
    wire_s = sum(wires.values()) - waited_s
    sent = transfer(found, hosts.room_of(job), compute_s=compute_s, num_micro=job.accumulate) if found else Transfer()
    step_s = (max(compute_s, wire_s) if hidden else compute_s + wire_s) + waited_s + update_s + sent.waited_s
    bound = _bound(compute_s, wire_s + waited_s, sent)
    return Times(compute_s, wires, update_s, step_s, tokens / step_s, useful / step_s / peak, bound, sent)


def _bound(compute_s: float, wire_s: float, sent: Transfer) -> str:
    """What takes longest."""
    on_link = sent.fetch_s + sent.uses_s + sent.activations_s + sent.link_s
    on_disk = sent.disk_s + sent.read_s
    every = {"compute": compute_s, "wire": wire_s, "host link": on_link, "host": sent.host_s, "disk": on_disk}
    return max(every, key=lambda name: every[name])


def _recomputed(job: Job) -> float:
    """FLOPs per token that no formula of a model counts."""
    whole, products = closed.flops_per_token(job.config, job.seq), closed.flops_per_token(job.config, 0)
    of_products, of_attention = _RECOMPUTED[job.remat]
    fused = not facts.is_tpu(job.parsed) and jnp.dtype(precisions.get(job.precision).compute).itemsize == 2
    return (of_products * products + (of_attention + _SCORES_AGAIN["cudnn" if fused else "plain"]) * (whole - products)) / 3


def _beyond(job: Job) -> float:
    """FLOPs per token of experts on rows that are empty or another expert's: on GPUs the ragged product is a dense one, masked,
    over all rows for each expert of the device; TPUs have an instruction for it. A capacity's blocks are computed whole.
    """
    config = job.config
    if not isinstance(config, MixtralConfig):
        return 0.0
    is_ragged = config.capacity_factor is None
    masked = config.num_experts // job.expert if is_ragged and not facts.is_tpu(job.parsed) else 1
    rows = config.top_k if is_ragged and facts.is_tpu(job.parsed) else exchanges.num_rows(job) / job.micro_tokens
    each = 6.0 * 3 * config.dim * config.ffn_dim * config.num_layers
    return each * (rows * masked - config.top_k) * (1 if job.remat == "none" else 4 / 3)


def _lockstep(job: Job) -> float:
    """How much longer than its share a pipeline's device takes: bubbles, slower neighbours, padded stages and the head."""
    if job.pipe == 1:
        return 1.0
    schedule, config = pipelines.schedule_of(job), job.config
    layers = closed.flops_per_token(config, job.seq)
    head = 6.0 * config.vocab_size * config.dim
    even = layers / schedule.num_virtual_stages
    slowest = (layers - head) / config.num_layers * pipelines.rows_of(job) + head
    return slowest / even / (1.0 - schedule.waiting_fraction)


def _bandwidth(job: Job, axes: str) -> float:
    """Axes further inside have their members nearer: `tensor`'s are neighbours, `replica` strides over all others."""
    names = axes.split("+")
    members = math.prod(job.mesh.get(axis, 1) for axis in names)
    stride = math.prod(job.mesh.get(axis, 1) for axis in AXES[max(map(AXES.index, names)) + 1 :])
    return facts.ring_bandwidth(job.parsed, members, stride) * facts.WIRE_FRACTION
