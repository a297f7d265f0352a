"""What a step's memory is for: at its peak by buffer, and over the step by role."""

from collections.abc import Container
from functools import partial
from typing import Any

import jax

from jzero import hlo
from jzero._types import ROLES

# What a temporary is for, as the names say that JAX's transformations leave in the program.
GATHERED, FORWARD, RECOMPUTED, BACKWARD, UPDATE = TEMPS = (
    "gathered parameters", "forward", "recomputed", "backward", "gradients and update"
)  # fmt: skip
MOST_POINTS = 400


def purpose(buffer: hlo.Buffer) -> str:
    """Which of `TEMPS` a temporary is."""
    if buffer.opcode.startswith("all-gather") or buffer.op_name.endswith("all_gather") or buffer.keeps:
        return GATHERED
    if "rematted_computation" in buffer.op_name:
        return RECOMPUTED
    if is_backward(buffer.op_name):
        return BACKWARD
    return FORWARD if "jvp(" in buffer.op_name else UPDATE


def is_backward(op_name: str) -> bool:
    """Whether an operation belongs to the backward pass, what it computes again included."""
    return "transpose(" in op_name or "rematted_computation" in op_name


def at_peak(found: hlo.Liveness, most: int = 10) -> list[dict[str, Any]]:
    """The largest temporaries alive when most are, each with the line of code that made it."""
    return [
        {
            "array": buffer.shape, "bytes": buffer.bytes, "role": purpose(buffer), "source": buffer.source,
            "op_name": buffer.op_name, "instruction": buffer.instruction,
        }
        for buffer in found.at(found.peak_at)[:most]
    ]  # fmt: skip


def timeline(found: hlo.Liveness, resting: dict[str, int]) -> dict[str, list[int]]:
    """Bytes per device by role at up to `MOST_POINTS` moments of the step: what rests, then temporaries by purpose.

    Several instructions share a moment in a long program; the one at which most is alive stands for them.
    """
    lines = {name: found.timeline(partial(_is_for, name)) for name in TEMPS}
    totals = [sum(amounts) for amounts in zip(*lines.values(), strict=True)]
    width = -(-len(totals) // MOST_POINTS)
    starts = range(0, len(totals), width)
    chosen = [max(range(start, min(start + width, len(totals))), key=totals.__getitem__) for start in starts]
    table = {role: [resting[role]] * len(chosen) for role in ROLES if resting.get(role)}
    return table | {name: [line[moment] for moment in chosen] for name, line in lines.items() if any(line)}


def _is_for(name: str, buffer: hlo.Buffer) -> bool:
    return purpose(buffer) == name


def kept(found: hlo.Liveness, allowed: Container[int]) -> list[hlo.Buffer]:
    """Gathered weights that the forward pass leaves whole for the backward pass, one layer or a stack of them.

    Args:
      allowed: elements of the weights that may stay whole: the last use's, whose backward pass comes next.
    """
    return [
        buffer
        for buffer in found.buffers
        if buffer.kind == "temp"
        and purpose(buffer) == GATHERED
        and not is_backward(buffer.op_name)
        and is_backward(buffer.last_read)
        and buffer.elements not in allowed
        and not buffer.shape.startswith(("s", "u", "pred"))  # of integers: tokens, not weights
    ]


def shows_host(mesh: jax.sharding.Mesh) -> bool:
    """Whether compiled programs show what they keep in host memory: not on CPU, nor from the GPU compiler without a device."""
    platform = mesh.devices.flat[0].platform
    return platform == "tpu" or (platform != "cpu" and set(mesh.devices.flat) <= set(jax.devices()))


def bytes_saved_on_host(compiled: Any, module: hlo.Module) -> int:
    """Temporaries of a program in host memory; where the compiler does not count them, what it copies there."""
    counted = int(getattr(compiled.memory_analysis(), "host_temp_size_in_bytes", 0))
    return counted or sum(one.bytes for one in hlo.host_transfers(module) if one.what == "copy")
