"""What the closed form needs of a pipeline: the schedule's figures, and the costs that the engine's own formula gives."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jzero import precision as precisions
from jzero import stages
from jzero.engine import pipeline_costs
from jzero.engine.stage_layers import StageLayers
from jzero.models import ModelConfig
from jzero.pipeline import partition, schedules, slots
from jzero.pipeline.schedule import Schedule
from jzero.plan.job import SCHEDULE, Job
from jzero.plan.shapes import Leaf, is_tied, leaves

_NUM_SCALARS = 2  # the loss and the norm


def schedule_of(job: Job) -> Schedule:
    """The table that the job's microbatches run by."""
    return _schedule(job.schedule or SCHEDULE, job.pipe, job.accumulate)


def rows_of(job: Job) -> int:
    """Layers of the largest stage; all of them without a pipeline."""
    if job.pipe == 1:
        return job.config.num_layers
    return math.ceil(job.config.num_layers / schedule_of(job).num_virtual_stages)


def held(job: Job) -> tuple[Leaf, ...]:
    """One device's parameters, ZeRO's split apart: its pieces over other axes, its layers of a pipeline (padding included)."""
    return _held(job.config, job.tensor, job.expert, rows_of(job) * (schedule_of(job).num_chunks if job.pipe > 1 else 1))


@cache
def _held(config: ModelConfig, tensor: int, expert: int, count: int) -> tuple[Leaf, ...]:
    return tuple(leaf._replace(repeats=count) if leaf.is_layer else leaf for leaf in leaves(config, tensor, expert))


def num_live(job: Job) -> int:
    """Microbatches whose activations a device keeps at once."""
    return 1 if job.pipe == 1 else _slots(job.schedule or SCHEDULE, job.pipe, job.accumulate).num_saved


def costs(job: Job, saved_bytes_per_token: int) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Buffers and bubbles, and bytes on the wire, as `jzero.engine.pipeline_costs` counts them for a step."""
    plan = _plan(job, saved_bytes_per_token)
    return pipeline_costs.summary(plan), pipeline_costs.wire(plan)


def _plan(job: Job, saved_bytes_per_token: int) -> pipeline_costs.Plan:
    policy, schedule = precisions.get(job.precision), schedule_of(job)
    counts = partition.even(job.config.num_layers, schedule.num_virtual_stages)
    x = jax.ShapeDtypeStruct((job.micro_tokens, job.config.dim), policy.compute)
    saved = jax.ShapeDtypeStruct((job.micro_tokens * saved_bytes_per_token,), jnp.int8)
    kept = [saved] if "W" in schedule.ops else []  # what I leaves for W: the layer's own residuals once more
    parts = [_part(leaf, job) for leaf in leaves(job.config, job.tensor)]
    axes = {"replica": job.replica, "data": job.data, "pipe": job.pipe}
    return pipeline_costs.Plan(
        schedule, _slots(job.schedule or SCHEDULE, job.pipe, job.accumulate), StageLayers(counts, job.pipe), True,
        job.config.num_layers, parts, [x], [saved], kept, stages.get(job.stage), policy, axes, _NUM_SCALARS,
        _busy_ticks(job.schedule or SCHEDULE, job.pipe, job.accumulate),
    )  # fmt: skip


def _part(leaf: Leaf, job: Job) -> pipeline_costs.Part:
    is_split = stages.get(job.stage).shard_params and job.data > 1 and leaf.is_split(job.data)
    if leaf.is_layer:
        divides = job.config.num_layers % job.pipe == 0
        dim = 0 if divides else next((i + 1 for i, size in enumerate(leaf.shape) if size % job.pipe == 0), None)
        return pipeline_costs.Part(leaf.size * leaf.repeats, "layers", is_split, True, dim)
    part = "tied" if is_tied(leaf, job.config) else "embed" if leaf.name in ("wte", "wpe") else "head"
    return pipeline_costs.Part(leaf.size, part, is_split, True, None)


@cache
def _schedule(name: str, num_pipe_stages: int, num_microbatches: int) -> Schedule:
    return schedules.get(name, num_pipe_stages, num_microbatches)


@cache
def _busy_ticks(name: str, num_pipe_stages: int, num_microbatches: int) -> tuple[int, ...]:
    return pipeline_costs.busy_ticks(_slots(name, num_pipe_stages, num_microbatches))


@cache
def _slots(name: str, num_pipe_stages: int, num_microbatches: int) -> slots.Slots:
    return slots.assign(_schedule(name, num_pipe_stages, num_microbatches))
