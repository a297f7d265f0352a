"""The closed form of time: a roofline per device, from the facts of the device and the traffic of the stage."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from jzero import precision as precisions
from jzero.plan import closed, facts, pipelines
from jzero.plan.job import Job

# Of the forward pass (a third of the model's FLOPs) what the backward pass computes again: weights' products, attention.
# Attention's scores are never saved (`jzero.attention`); cuDNN's kernel needs half of its forward pass to have them.
_RECOMPUTED = {"none": (0.0, 0.0), "dots": (0.0, 1.0), "full": (1.0, 1.0)}
_SCORES_AGAIN = {"plain": 1.0, "cudnn": 0.5}
_UPDATE_BYTES = 28  # fp32 AdamW: reads parameter, gradient and two moments, writes three


class Times(NamedTuple):
    """Seconds per step, what they are made of, and the rates that follow."""

    compute_s: float
    wire_s: dict[str, float]  # axis -> seconds
    update_s: float
    step_s: float
    tokens_per_s_per_device: float
    mfu: float
    bound: str  # "compute" or "wire"


def times(job: Job) -> Times:
    """How long one step takes if matmuls and wires reach what they reach alone (`facts.MATMUL_FRACTION`, `WIRE_FRACTION`).

    Gathers and reductions at each use hide behind the layer's matmuls, so the longer of the two counts; those once a step stand
    alone, and so do the sums over `tensor`, which the next product waits for. Every tick of a pipeline lasts as long as its
    slowest stage, which the head makes the last one. Nothing else is lost here: kernels, input, stragglers. So it is a good
    run's time and not an average one's.
    """
    device = facts.FACTS[job.parsed.model]
    tokens = job.batch * job.seq / job.num_devices
    useful, again = closed.flops_per_token(job.config, job.seq) * tokens, _recomputed(job) * tokens
    peak = device.peak[jnp.dtype(precisions.get(job.precision).compute).name]
    compute_s = (useful + again) / (peak * facts.MATMUL_FRACTION) * _lockstep(job)
    wires = {axis: sum(kinds.values()) / _bandwidth(job, axis) for axis, kinds in closed.wire(job).items()}
    rested = closed.memory(job).at_rest
    update_s = (rested["params"] + rested["opt_state"]) / 12 * _UPDATE_BYTES / device.memory_bandwidth
    hidden = job.stage == 3 or (job.stage == 2 and job.accumulate > 1)
    waited_s = wires.get("tensor", 0.0)
    wire_s = sum(wires.values()) - waited_s
    step_s = (max(compute_s, wire_s) if hidden else compute_s + wire_s) + waited_s + update_s
    bound = "compute" if compute_s >= wire_s + waited_s else "wire"
    return Times(compute_s, wires, update_s, step_s, tokens / step_s, useful / step_s / peak, bound)


def _recomputed(job: Job) -> float:
    """FLOPs per token that no formula of a model counts."""
    whole, products = closed.flops_per_token(job.config, job.seq), closed.flops_per_token(job.config, 0)
    of_products, of_attention = _RECOMPUTED[job.remat]
    fused = not facts.is_tpu(job.parsed) and jnp.dtype(precisions.get(job.precision).compute).itemsize == 2
    return (of_products * products + (of_attention + _SCORES_AGAIN["cudnn" if fused else "plain"]) * (whole - products)) / 3


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
    order = ("replica", "data", "pipe", "tensor")
    members = math.prod(job.mesh.get(axis, 1) for axis in names)
    stride = math.prod(job.mesh.get(axis, 1) for axis in order[max(map(order.index, names)) + 1 :])
    return facts.ring_bandwidth(job.parsed, members, stride) * facts.WIRE_FRACTION
