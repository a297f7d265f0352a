"""What an executor needs of a schedule: for every tick and pipe stage the slots of its buffers, each buffer as small as can be.

Four buffers per device: activations that arrived and wait for their forward pass; gradients that arrived and wait for their
backward pass; what forward saved for backward; and what I saved for W. A value occupies its slot from the end of the tick that
writes it to the tick that reads it last.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jzero.pipeline.entry import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from jzero.pipeline.schedule import Schedule

NONE = -1  # no slot


class Cell(NamedTuple):
    """What one pipe stage does in one tick, as numbers. Slots are `NONE` where nothing is read or written."""

    op: int = 0  # 0 idle, or 1 + index in `Slots.ops`
    microbatch: int = 0
    chunk: int = 0
    stage: int = 0
    reads_activation: int = NONE  # slot of the forward pass's input; NONE on the first virtual stage, which embeds
    reads_gradient: int = NONE
    saved: int = NONE  # written by F, read by B, I and W
    kept: int = NONE  # written by I, read by W
    embeds: int = 0  # 1: forward of the first virtual stage
    ends: int = 0  # 1: forward of the last virtual stage: the head, which gives the first gradient
    returns: int = 0  # 1: backward of the first virtual stage: the embedding's gradient
    makes_gradient: int = NONE  # slot of the head's gradient
    activation_arrives: int = NONE  # slot that what the stage before sends in this tick goes to
    gradient_arrives: int = NONE


class Slots(NamedTuple):
    """A schedule for the executor: `cells[tick][pipe stage]` and the number of slots of each buffer."""

    ops: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    num_activations: int
    num_gradients: int
    num_saved: int
    num_kept: int


Span = tuple[int, int, tuple[int, int]]  # written at the end of this tick, last read in that one, (virtual stage, microbatch)


def assign(schedule: Schedule) -> Slots:
    """The smallest buffers for a valid schedule, the same size on every pipe stage, and each value's slot in them."""
    when = _times(schedule)
    size = schedule.num_pipe_stages
    buffers: list[dict[tuple[int, int], int]] = [{}, {}, {}, {}]
    counts = [0, 0, 0, 0]
    for stage in range(size):
        mine = [key for key in when if key[0] % size == stage]
        for buffer, own in enumerate(_spans(schedule, when, mine)):
            found, count = _color(own)
            buffers[buffer] |= found
            counts[buffer] = max(counts[buffer], count)
    return Slots(schedule.ops, _cells(schedule, *buffers), *counts)


class _Times(NamedTuple):
    """The ticks of one microbatch on one virtual stage; `weight` is `backward` where backward is whole."""

    forward: int
    backward: int
    weight: int


def _times(schedule: Schedule) -> dict[tuple[int, int], _Times]:
    found: dict[tuple[int, int], list[int]] = {}
    for tick, row in enumerate(schedule.table):
        for stage, entry in enumerate(row):
            if entry is not None:
                times = found.setdefault((entry.chunk * schedule.num_pipe_stages + stage, entry.microbatch), [NONE] * 3)
                times[0 if entry.op == FORWARD else 2 if entry.op == WEIGHT_GRAD else 1] = tick
    return {key: _Times(times[0], times[1], max(times[1:])) for key, times in found.items()}


def _spans(schedule: Schedule, when: dict[tuple[int, int], _Times], mine: Sequence[tuple[int, int]]) -> tuple[list[Span], ...]:
    """One pipe stage's values in each of the four buffers."""
    last = schedule.num_virtual_stages - 1
    activations = [(when[v - 1, m].forward, when[v, m].forward, (v, m)) for v, m in mine if v > 0]
    if schedule.only_forward:
        return (activations,)
    return (
        activations,
        [(when[v, m].forward if v == last else when[v + 1, m].backward, when[v, m].backward, (v, m)) for v, m in mine],
        [(when[v, m].forward, when[v, m].weight, (v, m)) for v, m in mine],
        [(when[v, m].backward, when[v, m].weight, (v, m)) for v, m in mine if when[v, m].weight > when[v, m].backward],
    )


def _color(spans: Iterable[Span]) -> tuple[dict[tuple[int, int], int], int]:
    """Slots such that values alive together have different ones: first come, lowest free slot, which is optimal for spans."""
    free, busy, slots, count = [], [], {}, 0
    for start, end, key in sorted(spans):
        while busy and busy[0][0] <= start:  # read in the tick at whose end the new value comes: the slot is free
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, count)
            count += 1
        slots[key] = heapq.heappop(free)
        heapq.heappush(busy, (end, slots[key]))
    return slots, count


def _cells(
    schedule: Schedule, activations: dict[tuple[int, int], int], gradients: dict[tuple[int, int], int],
    saved: dict[tuple[int, int], int], kept: dict[tuple[int, int], int],
) -> tuple[tuple[Cell, ...], ...]:  # fmt: skip
    size, last = schedule.num_pipe_stages, schedule.num_virtual_stages - 1
    rows = []
    for row in schedule.table:
        cells = [Cell(stage=stage) for stage in range(size)]
        arrivals = [{} for _ in row]
        for stage, entry in enumerate(row):
            if entry is None:
                continue
            virtual = entry.chunk * size + stage
            key, is_forward, has_output = (virtual, entry.microbatch), entry.op == FORWARD, entry.op != WEIGHT_GRAD
            is_back = has_output and not is_forward
            cells[stage] = Cell(
                op=1 + schedule.ops.index(entry.op),
                microbatch=entry.microbatch,
                chunk=entry.chunk,
                stage=stage,
                reads_activation=activations.get(key, NONE) if is_forward else NONE,
                reads_gradient=gradients[key] if is_back else NONE,
                saved=saved.get(key, NONE),
                kept=kept[key] if entry.op in (INPUT_GRAD, WEIGHT_GRAD) else NONE,
                embeds=int(is_forward and virtual == 0),
                ends=int(is_forward and virtual == last),
                returns=int(is_back and virtual == 0),
                makes_gradient=gradients.get(key, NONE) if is_forward and virtual == last else NONE,
            )
            if is_forward and virtual < last:
                arrivals[(stage + 1) % size]["activation_arrives"] = activations[virtual + 1, entry.microbatch]
            elif is_back and virtual > 0:
                arrivals[(stage - 1) % size]["gradient_arrives"] = gradients[virtual - 1, entry.microbatch]
        rows.append(tuple(cell._replace(**arrives) for cell, arrives in zip(cells, arrivals, strict=True)))
    return tuple(rows)
