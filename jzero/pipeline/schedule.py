"""A pipeline schedule as data: a table of ticks by pipe stages, and the numbers that follow from it.

With S pipe stages of v chunks each, chunk c of stage s is virtual stage c S + s: activations always go to the next device of
the ring, gradients to the one before. What is sent in a tick arrives before the next one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jzero.pipeline.entry import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Entry, Table
from jzero.pipeline.validate import check, live_activations

COSTS = {FORWARD: 1.0, BACKWARD: 2.0, INPUT_GRAD: 1.0, WEIGHT_GRAD: 1.0}  # in forward passes of one chunk


@dataclass(frozen=True)
class Schedule:
    """Who computes what when, for one step of a pipeline. A value: the executor runs any that validates.

    Args:
      name: for drawings and reports; nothing depends on it.
      num_pipe_stages, num_microbatches, num_chunks: S, M and v. `num_chunks` counts the pieces of layers on each device.
      table: `[ticks][S]` of `Entry` (or `(op, microbatch[, chunk])`) or None. Ops: "F" forward, "B" backward, or instead of
        "B" its halves "I" (gradient of the input) and "W" (gradient of the weights).
      claimed_live: per pipe stage the most chunk inputs that are held at once, from forward to the end of backward; checked by
        `validate`. None claims nothing.
      only_forward: a table of "F" alone, for evaluation.

    Example:
      >>> table = [[("F", 0), None], [None, ("F", 0)], [None, ("B", 0)], [("B", 0), None]]
      >>> Schedule("mine", num_pipe_stages=2, num_microbatches=1, table=table).validate().bubble_fraction
      0.5
    """

    name: str
    num_pipe_stages: int
    num_microbatches: int
    table: Table
    num_chunks: int = 1
    claimed_live: tuple[int, ...] | None = None
    only_forward: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", tuple(tuple(map(_entry, row)) for row in self.table))

    def validate(self) -> "Schedule":
        """The schedule itself, if every microbatch goes forward and backward once through every chunk, in order.

        Raises:
          ValueError: the first violated rule with its tick and pipe stage.
        """
        check(self)
        return self

    @property
    def num_ticks(self) -> int:
        return len(self.table)

    @property
    def num_virtual_stages(self) -> int:
        return self.num_pipe_stages * self.num_chunks

    @cached_property
    def ops(self) -> tuple[str, ...]:
        """The operations that occur."""
        return tuple(sorted({entry.op for row in self.table for entry in row if entry is not None}))

    @cached_property
    def bubble_fraction(self) -> float:
        """Idle cells of the table, as a part of all: the published measure, where every operation takes one tick."""
        num_idle = sum(entry is None for row in self.table for entry in row)
        return num_idle / max(self.num_ticks * self.num_pipe_stages, 1)

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Per pipe stage: the most chunk inputs held at once, from forward to the end of backward."""
        return live_activations(self)

    def time(self, costs: Mapping[str, float] = COSTS) -> float:
        """How long the table takes when devices wait for each other in every tick, as the executor's do: a tick lasts as long
        as its slowest operation. In forward passes of one chunk under the default costs.
        """
        return sum(max((costs[entry.op] for entry in row if entry is not None), default=0.0) for row in self.table)

    def waste(self, costs: Mapping[str, float] = COSTS) -> float:
        """The part of `time` in which a device waits: for a bubble, or for a slower operation beside it."""
        busy = sum(costs[entry.op] for row in self.table for entry in row if entry is not None)
        return 1.0 - busy / (self.time(costs) * self.num_pipe_stages)

    @cached_property
    def waiting_fraction(self) -> float:
        """`waste()` under the default costs."""
        return self.waste()

    def draw(self) -> str:
        """The table as text: one line per pipe stage, one column per tick."""
        from jzero.pipeline.drawing import text

        return text(self)

    def draw_png(self, path: str) -> None:
        """Write the table as a picture; the ending of `path` chooses the format. Needs matplotlib (the extra `plot`)."""
        from jzero.pipeline.drawing import picture

        picture(self, path)


def _entry(cell: Sequence[Any] | None) -> Entry | None:
    return cell if cell is None or isinstance(cell, Entry) else Entry(*cell)
