"""A job's plan: the closed form at once, the compiled program if asked for, and the two side by side."""

from typing import Any

from jzero.models import GPT2Config
from jzero.plan import closed, compiled, facts, fit, pipelines
from jzero.plan.job import Job
from jzero.plan.result import Plan
from jzero.plan.room import usable_bytes
from jzero.plan.times import times
from jzero.report import human
from jzero.topology import memory_bytes

_GPU_ATTENTION = (
    "Compiled without a GPU, attention is XLA's own, which writes its scores; on the device cuDNN's is used for 16-bit "
    "dtypes and writes none: the closed form's peak is {peak} then."
)


def plan_job(job: Job, *, compile_too: bool = True) -> Plan:
    """The plan of `job`.

    Raises:
      CannotCompile: `compile_too`, and the target's compiler is missing or fails.
    """
    need = closed.memory(job)
    measured = compiled.compile_job(job) if compile_too else None
    figures: dict[str, Any] = {
        "at_rest": need.at_rest, "wire": closed.wire(job), "temp_bytes": need.temp_bytes, "peak_bytes": need.peak_bytes,
        "moment": need.moment, "parts": need.parts,
    }  # fmt: skip
    room = usable_bytes(job.target)
    fits = (measured or figures)["peak_bytes"] <= room
    # Where the compiled program is larger than the closed form said, a change must win that much more.
    allowed = room - max(0, measured["peak_bytes"] - need.peak_bytes) if measured else room
    ways = [] if fits else fit.changes(job, room=allowed)
    if measured:
        ways = fit.compiled_changes(ways, room=room)
    return Plan(
        job=job.to_dict(),
        target=job.target,
        device_bytes=memory_bytes(job.target),
        usable_bytes=room,
        closed=figures,
        compiled=measured,
        time=times(job)._asdict(),
        changes=[one.to_dict() for one in ways],
        notes=_notes(job),
    )


def _notes(job: Job) -> list[str]:
    fused = human(closed.memory(job, fused_attention=True).peak_bytes)
    notes = [] if facts.is_tpu(job.parsed) or job.precision == "fp32" else [_GPU_ATTENTION.format(peak=fused)]
    whole = [leaf.name for leaf in closed.leaves(job.config, job.tensor) if not leaf.is_split(job.data)]
    if whole and job.stage and job.data > 1:
        notes.append(f"data={job.data} divides no dim of {', '.join(whole)}: they stay whole on every device.")
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
    if job.tensor > 1 and isinstance(job.config, GPT2Config):
        notes.append("GPT-2's fused q, k and v are split across heads: all-to-alls over `tensor`, which are not counted here.")
    return notes
