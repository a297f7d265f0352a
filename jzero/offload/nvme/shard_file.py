"""One file of a swap: the piece of one leaf that one device holds, in two slots of which one is always whole.

    slot 0: header | payload        slot 1: header | payload        each padded to whole blocks

A step reads slot `g % 2` of generation g and writes the other; nothing that a reader could want is overwritten. A leaf that no
step changes has one slot, which generation 0 fills for good. A header says what the payload is, of which generation and
optimizer step, and has an XXH3 of every part of it, so that a read of a part is verified on its own. Headers tell damage and
mix-ups; which generation counts is said by the swap's commit alone.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jzero._errors import explain
from jzero.offload.nvme import direct
from jzero.offload.nvme.direct import ALIGN, padded

MAGIC = b"jzero-nvme 1 "
PART_BYTES = 2**23  # of one read or write, at most: enough for any drive, and several threads can share a leaf
LEAST_BYTES = 2**20  # parts that would be smaller follow no rows
_JSON_BYTES = 1024  # of a header without its sums and paths
_SUM_BYTES = 20  # of one sum as JSON
_OF_FILE = ("bytes", "file", "slots")  # of a layout's row, what is not about the leaf
WHO = "jzero.Offload: nvme"


class CorruptSwap(ValueError):
    """A file of a swap is not what was written; the message names it."""


@functools.cache
def part_bytes(num_bytes: int, num_rows: int) -> int:
    """The parts that a payload is moved and summed in: whole rows or whole fractions of one where these fill blocks.

    Then slices of rows consist of parts, and can be read and written by themselves.
    """
    row = num_bytes // max(num_rows, 1)
    if row < PART_BYTES:
        counts = range(num_bytes // LEAST_BYTES, -(-num_bytes // PART_BYTES) - 1, -1)  # of parts: the smallest parts first
        fits = (num_bytes // num for num in counts if num and num_rows % num == 0)
        return next((size for size in fits if size % ALIGN == 0), PART_BYTES)
    fits = [num for num in range(-(-row // PART_BYTES), row // LEAST_BYTES + 1) if row % num == 0 and row // num % ALIGN == 0]
    return row // fits[0] if fits else PART_BYTES


class ShardFile(NamedTuple):
    """Where one shard lies, and what its headers say about it besides generation, step and sums."""

    path: Path
    about: dict[str, Any]  # run, leaf, shape, dtype, shard ([start, stop] per dim)
    num_bytes: int
    num_slots: int = 2  # 1: it is written when the state is placed, and never again

    @classmethod
    def of(cls, folder: Path, row: dict[str, Any]) -> "ShardFile":
        """The file that a row of a swap's layout is about."""
        about = {name: value for name, value in row.items() if name not in _OF_FILE}
        return cls(folder / row["file"], about, row["bytes"], row["slots"])

    @property
    def row(self) -> dict[str, Any]:
        """As the layout has it."""
        return {**self.about, "bytes": self.num_bytes, "file": self.path.name, "slots": self.num_slots}

    @property
    def part_bytes(self) -> int:
        start, stop = (self.about["shard"] or [[0, 1]])[0]
        return part_bytes(self.num_bytes, stop - start)

    @property
    def num_parts(self) -> int:
        return -(-self.num_bytes // self.part_bytes)

    @property
    def header_bytes(self) -> int:
        return padded(_JSON_BYTES + len(json.dumps(self.about)) + _SUM_BYTES * self.num_parts)

    @property
    def slot_bytes(self) -> int:
        return self.header_bytes + padded(self.num_bytes)

    @property
    def file_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def slot(self, generation: int) -> int:
        """Where a generation of it lies."""
        return generation % self.num_slots

    def create(self) -> None:
        """Make the file and claim its room, so that a full disk is met now and not in the middle of a step."""
        file = direct.open_file(self.path, create=True)
        try:
            os.posix_fallocate(file.descriptor, 0, self.file_bytes)
        finally:
            file.close()

    def parts(self, memory: np.ndarray, start: int = 0, num_bytes: int | None = None) -> list[tuple[int, np.ndarray]]:
        """`(offset in the payload, view of memory)` of what is moved at once, for `num_bytes` from `start`, a part's start."""
        num_bytes, step = self.num_bytes if num_bytes is None else num_bytes, self.part_bytes
        size = padded(num_bytes)
        return [(start + at, memory[at : min(at + step, size)]) for at in range(0, num_bytes, step)]

    def write(self, slot: int, at: int, part: np.ndarray) -> str:
        """Write a part of a slot's payload; its sum, for the header. What pads the last part is no part of the sum."""
        file = direct.open_file(self.path)
        try:
            file.write(part, self._payload(slot) + at)
        finally:
            file.close()
        return self.sum(at, part)

    def read(self, slot: int, at: int, into: np.ndarray, expected: str) -> None:
        """Read a part of a slot's payload and compare it with its sum."""
        try:
            file = direct.open_file(self.path)
            try:
                file.read(into, self._payload(slot) + at)
            finally:
                file.close()
        except (direct.TruncatedFile, FileNotFoundError) as error:
            raise self.corrupt(f"cannot be read: {error}") from error
        found = self.sum(at, into)
        if found != expected:
            raise self.corrupt(
                f"bytes {at:,} to {min(at + into.size, self.num_bytes):,} have XXH3 {found}, written was {expected}"
            )

    def sum(self, at: int, part: np.ndarray) -> str:
        return xxhash.xxh3_64_hexdigest(memoryview(part[: min(part.size, self.num_bytes - at)]))

    def write_header(self, slot: int, *, generation: int, step: int | None, sums: list[str]) -> None:
        """Write what the payload is, and return when both are on the drive."""
        text = json.dumps(
            {**self.about, "bytes": self.num_bytes, "generation": generation, "step": step, "xxh3": sums}
        ).encode()
        line = MAGIC + xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text
        block = direct.aligned(self.header_bytes)
        block[: len(line)] = np.frombuffer(line, np.uint8)
        file = direct.open_file(self.path)
        try:
            file.write(block, slot * self.slot_bytes)
            file.sync()
        finally:
            file.close()

    def header(self, slot: int) -> dict[str, Any]:
        """What a slot's header says.

        Raises:
          CorruptSwap: it cannot be read, or is about another leaf or run than this file's.
        """
        block = direct.aligned(self.header_bytes)
        try:
            file = direct.open_file(self.path)
            try:
                file.read(block, slot * self.slot_bytes)
            finally:
                file.close()
        except OSError as error:
            raise self.corrupt(f"cannot be read: {error}") from error
        line = block.tobytes().rstrip(b"\0")
        start, _, text = line.partition(b"\n")
        if start != MAGIC + xxhash.xxh3_64_hexdigest(text).encode():
            raise self.corrupt(f"the header of slot {slot} is damaged")
        found = json.loads(text)
        wrong = [
            f"{name} {found.get(name)!r}, expected {value!r}" for name, value in self.about.items() if found.get(name) != value
        ]
        if wrong:
            raise self.corrupt(f"the header of slot {slot} is about something else: {'; '.join(wrong)}")
        return found

    def _payload(self, slot: int) -> int:
        return slot * self.slot_bytes + self.header_bytes

    def corrupt(self, what: str) -> CorruptSwap:
        problem = "a swap file is not what was written"
        context = f"{self.about['leaf']} {self.about['dtype']}{self.about['shape']}, shard {self.about['shard']}"
        fix = "Restore a checkpoint, which writes the swap anew; if it happens again, suspect the drive."
        return CorruptSwap(explain(WHO, problem, found=[f"{self.path}: {what}"], context=context, fix=fix))
