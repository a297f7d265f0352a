"""Host memory for a swap's pipeline: a few lanes of one size, allocated once and never more."""

from collections.abc import Sequence

import numpy as np

from jzero.offload.nvme.direct import ALIGN, aligned, padded


class Lane:
    """One aligned piece of memory that a bucket's arrays are laid out in, one after the other."""

    def __init__(self, num_bytes: int):
        self._memory = aligned(num_bytes)

    def cut(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Room for arrays of these bytes, each padded to whole blocks: uint8 views."""
        starts = np.cumsum([0, *map(padded, sizes)])
        assert starts[-1] <= self._memory.size, f"{sizes} do not fit into a lane of {self._memory.size} bytes"
        return [self._memory[start : start + padded(size)] for start, size in zip(starts, sizes, strict=False)]


class Pool:
    """`num_lanes` lanes of `lane_bytes` each."""

    def __init__(self, num_lanes: int, lane_bytes: int):
        self.num_lanes, self.lane_bytes = num_lanes, max(padded(lane_bytes), ALIGN)
        self._free = [Lane(self.lane_bytes) for _ in range(num_lanes)]

    @property
    def num_bytes(self) -> int:
        return self.num_lanes * self.lane_bytes

    def take(self) -> Lane | None:
        """A lane, or None while all are in use."""
        return self._free.pop() if self._free else None

    def give(self, lane: Lane) -> None:
        self._free.append(lane)
