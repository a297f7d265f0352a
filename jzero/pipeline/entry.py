"""One cell of a schedule's table: what one device of the pipeline does in one tick."""

from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"  # both gradients at once
INPUT_GRAD = "I"  # the gradient that the pipe stage before is waiting for
WEIGHT_GRAD = "W"  # the gradient that nobody is waiting for

OPS = (FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD)


class Entry(NamedTuple):
    """An operation on one microbatch by one chunk of a pipe stage's layers."""

    op: str  # one of `OPS`
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.op}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Table = tuple[tuple[Entry | None, ...], ...]  # [ticks][pipe stages]; None is idle
