"""A job's plan: the closed form at once, the compiled program if asked for, and the two side by side."""

from dataclasses import replace
from typing import Any

from jzero.models import GPT2Config, MixtralConfig
from jzero.offload.asked import AUTO, NVME
from jzero.offload.host import PINNED_LIMIT
from jzero.plan import closed, compiled, exchanges, facts, fit, hosts, offloads, pipelines
from jzero.plan.away import Away
from jzero.plan.job import Job
from jzero.plan.result import Plan
from jzero.plan.room import needs, usable_bytes
from jzero.plan.shapes import Zero
from jzero.plan.times import times
from jzero.report import human
from jzero.topology import memory_bytes

_GPU_ATTENTION = (
    "Compiled without a GPU, attention is XLA's own, which writes its scores; on the device cuDNN's is used for 16-bit "
    "dtypes and writes none: the closed form's peak is {peak} then."
)
_BLIND = (
    "Not compiled: the GPU compiler without a device knows no host memory: not for activations, nor for an update or gradients."
)
_ATTENTION = {"ulysses": "an exchange of heads", "ring": "a ring"}


def plan_job(job: Job, *, compile_too: bool = True) -> Plan:
    """The plan of `job`.

    Raises:
      CannotCompile: `compile_too`, and the target's compiler is missing or fails.
    """
    job, decided = _decided(job)
    need, away = closed.memory(job), offloads.away(job)
    is_blind = offloads.is_blind(job)
    measured = compiled.compile_job(job) if compile_too and not is_blind else None
    figures: dict[str, Any] = {
        "at_rest": need.at_rest, "wire": closed.wire(job), "temp_bytes": need.temp_bytes, "peak_bytes": need.peak_bytes,
        "moment": need.moment, "parts": need.parts,
    }  # fmt: skip
    if away is not None:
        figures["offload"] = _off_the_device(away)
    limit, budgets = usable_bytes(job.target), needs(job)
    fits = (measured or figures)["peak_bytes"] <= limit and all(one.fits for one in budgets.values())
    # Where the compiled program is larger than the closed form said, a change must win that much more.
    allowed = limit - max(0, measured["peak_bytes"] - need.peak_bytes) if measured else limit
    ways = [] if fits else fit.changes(job, limit=allowed)
    if measured:
        ways = fit.compiled_changes(ways, limit=limit)
    return Plan(
        job=job.to_dict(),
        target=job.target,
        device_bytes=memory_bytes(job.target),
        usable_bytes=limit,
        budgets={name: one.to_dict() for name, one in budgets.items()},
        closed=figures,
        compiled=measured,
        time=times(job).to_dict(),
        changes=[one.to_dict() for one in ways],
        notes=[*decided, *_notes(job), *([_BLIND] if is_blind and compile_too else [])],
    )


def _decided(job: Job) -> tuple[Job, list[str]]:
    """With `update="auto"` the job with the choice in its place, and a note."""
    if job.offload is None or job.offload.update != AUTO:
        return job, []
    chosen = offloads.update_of(job)
    note = f"update=auto: on the {chosen}, by the figures of link and host memory. A step decides by what it measures."
    return job._replace(offload=replace(job.offload, update=chosen)), [note]


def _off_the_device(away: Away) -> dict[str, int]:
    """As the report of a step has it, and what the host needs beside what rests there."""
    return {
        "host_moved_bytes": away.host_moved, "disk_moved_bytes": away.disk_moved, "fetched_bytes": away.fetched,
        "activation_bytes": away.activations, "pool_bytes": away.pool, "staged_bytes": away.staged, "grad_bytes": away.grads,
        "host_bytes": away.host_bytes, "disk_bytes": away.disk_bytes, "num_buckets": len(away.trips),
        "moved_bytes": away.sent, "back_bytes": away.back, "at_use_bytes": away.uses.comes,
        "left_bytes": away.uses.left, "grads_in_host_bytes": away.uses.grads,
    }  # fmt: skip


def _notes(job: Job) -> list[str]:
    fused = human(closed.memory(job, fused_attention=True).peak_bytes)
    notes = [] if facts.is_tpu(job.parsed) or job.precision == "fp32" else [_GPU_ATTENTION.format(peak=fused)]
    whole = [leaf.name for leaf in closed.leaves(job.config, job.tensor, job.expert) if leaf.split(job.zero).pieces == 1]
    if whole and job.stage and job.zero != Zero():
        over = ", ".join(f"{axis}={job.mesh[axis]}" for axis in ("data", "expert", "sequence") if axis in job.mesh)
        notes.append(f"{over} divides no dim of {', '.join(whole)}: they stay whole on every device.")
    if job.pipe > 1:
        schedule, facts_of = pipelines.schedule_of(job), pipelines.costs(job, 0)[0]
        notes.append(
            f"pipeline {schedule.name}: {schedule.num_ticks} ticks, bubble {schedule.bubble_fraction:.1%} where operations "
            f"take one tick; devices wait {schedule.waiting_fraction:.1%} of the time where backward takes two forwards"
        )
        notes += [
            f"layers {what} in {share:.0%} more ticks than their microbatches need: collectives run on all devices at once"
            for what, share in facts_of["ticks_beyond_need"].items()
            if share > 0
        ]
    if job.sequence > 1:
        notes.append(f"attention over `sequence` by {_ATTENTION[job.attention_kind]} (attention_kind={job.attention_kind!r}).")
    if isinstance(job.config, MixtralConfig):
        notes += _of_experts(job)
    notes += _of_hosts(job)
    if job.tensor > 1 and isinstance(job.config, GPT2Config):
        notes.append("GPT-2's fused q, k and v are split across heads: all-to-alls over `tensor`, which are not counted here.")
    return notes


def _of_experts(job: Job) -> list[str]:
    """How full blocks are, and what a GPU makes of a ragged product."""
    config, notes = job.config, []
    assert isinstance(config, MixtralConfig)
    share = exchanges.num_rows(job) / (config.top_k * job.micro_tokens)
    if share > 1:
        notes.append(f"experts' blocks have room for {share:.3g} times the rows that are there (jzero.moe).")
    if config.capacity_factor is None and not facts.is_tpu(job.parsed) and config.num_experts > job.expert:
        each = config.num_experts // job.expert
        notes.append(f"XLA computes a ragged product on GPUs as {each} dense ones, masked; its time here is that of all.")
    return notes


def _of_hosts(job: Job) -> list[str]:
    """Where a host's figures are from, and what it may pin."""
    found = offloads.away(job)
    if found is None:
        return []
    room, source = hosts.room_of(job), hosts.HOSTS[job.parsed.model].source
    pinned = (found.host_bytes - found.pool) * room.devices
    fields = {"memory": job.host_memory, "link": None}
    fields |= {"disk": job.disk, "disk_bandwidth": job.disk_bandwidth} if NVME in offloads.places_of(job) else {}
    fields |= {"memory_bandwidth": None} if any(trip.by_host for trip in found.trips) else {}
    notes = [f"host's {name}: {source[name]}" for name, given in fields.items() if given is None]
    if not facts.is_tpu(job.parsed) and pinned > hosts.PINNED_LIMIT_BYTES:
        setting = f"{PINNED_LIMIT}={pinned // 2**30 + 8}"
        notes.append(f"A process that drives the {room.devices} devices of a host pins {human(pinned)}: set {setting}.")
    return notes
