"""The swap of one state: its files, and the one small file that says which generation of them counts.

A generation is what one optimizer step leaves behind. Its shards go into the slots that the generation before does not use;
when every one of them is on the drive, `commit.json` is replaced in one rename. A process that dies at any moment leaves either
generation whole and named, never a mixture, and a step that fails leaves the one before it. A leaf that no step changes is
part of every generation as it was placed.
"""

import json
import os
import shutil
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jzero._errors import explain
from jzero.offload.nvme import direct
from jzero.offload.nvme.shard_file import WHO, CorruptSwap, ShardFile

LAYOUT, COMMIT = "layout.json", "commit.json"


class Leaf(NamedTuple):
    """A leaf that rests in files."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any  # on the device
    is_still: bool = False  # no step changes it

    @classmethod
    def of(cls, path: str, aval: Any, sharding: Any, is_still: bool = False) -> "Leaf":
        return cls(path, tuple(aval.shape), np.dtype(aval.dtype), sharding, is_still)

    def shards(self) -> dict[tuple[tuple[int, int], ...], list[Any]]:
        """`[start, stop]` per dim of each piece of this process -> the devices that hold it, in a fixed order."""
        pieces: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
            pieces.setdefault(bounds, []).append(device)
        return dict(sorted(pieces.items()))


class Swap:
    """Files for some leaves of one state, in a folder of their own; `generation` 0 is what was placed first."""

    def __init__(self, folder: Path, leaves: Sequence[Leaf], *, run: str | None = None):
        self.folder, self.leaves, self.run = folder, tuple(leaves), run or uuid.uuid4().hex
        self.files = [self._files_of(index, leaf) for index, leaf in enumerate(self.leaves)]
        self.generation = -1
        self.step: int | None = (
            None  # updates that the committed generation has seen; None where it was placed and not yet used
        )
        self._sums: dict[tuple[int, Path], list[str]] = {}  # (slot, file) -> the sums of its parts

    def _files_of(self, index: int, leaf: Leaf) -> list[ShardFile]:
        found = []
        for number, bounds in enumerate(leaf.shards()):
            shape = [stop - start for start, stop in bounds]
            about = {
                "run": self.run, "leaf": leaf.path, "shape": list(leaf.shape), "dtype": leaf.dtype.name,
                "shard": [list(one) for one in bounds],
            }  # fmt: skip
            num_bytes = int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
            path = self.folder / f"{index:05}-{number:03}.bin"
            found.append(ShardFile(path, about, num_bytes, 1 if leaf.is_still else 2))
        return found

    @property
    def every_file(self) -> list[ShardFile]:
        return [file for files in self.files for file in files]

    def generation_of(self, index: int) -> int:
        """The generation of a leaf that counts now."""
        return 0 if self.leaves[index].is_still else self.generation

    def slot(self, file: ShardFile) -> int:
        """Where what counts of a file lies."""
        return file.slot(self.generation)

    def next_slot(self, file: ShardFile) -> int:
        return file.slot(self.generation + 1)

    @property
    def num_bytes(self) -> int:
        """On the disk, all slots and headers."""
        return sum(file.file_bytes for file in self.every_file)

    @property
    def payload_bytes(self) -> int:
        """Of one generation: what a step reads."""
        return sum(file.num_bytes for file in self.every_file)

    @property
    def written_bytes(self) -> int:
        """What a step writes of it."""
        return sum(file.num_bytes for file in self.every_file if file.num_slots > 1)

    def create(self) -> None:
        """Make all files at their full size. The folder is removed when nothing refers to the swap any more."""
        self.folder.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        layout = {"run": self.run, "pid": os.getpid(), "leaves": [file.row for file in self.every_file]}
        replace(self.folder / LAYOUT, layout)
        for file in self.every_file:
            file.create()
        sync_folder(self.folder)

    def sums(self, file: ShardFile) -> list[str]:
        """Of the committed generation."""
        return self._sums[self.slot(file), file.path]

    def finish(self, file: ShardFile, sums: list[str], step: int | None) -> None:
        """A shard of the next generation is written: its header, and wait for the drive."""
        assert file.num_slots > 1 or self.generation < 0, f"{file.path.name} never changes"
        slot = self.next_slot(file)
        self._sums[slot, file.path] = sums
        file.write_header(slot, generation=self.generation + 1, step=step, sums=sums)

    def commit(self, step: int | None) -> None:
        """The next generation, every shard of which is finished, is the one that counts."""
        missing = [file.path.name for file in self.every_file if (self.next_slot(file), file.path) not in self._sums]
        assert not missing, f"{missing} were never written"
        self._say(self.generation + 1, step)

    def take_back(self, step: int | None) -> None:
        """The generation before, of that step, is the one that counts after all: nothing has been written over it yet."""
        self._say(self.generation - 1, step)

    def _say(self, generation: int, step: int | None) -> None:
        replace(self.folder / COMMIT, {"run": self.run, "generation": generation, "step": step})
        self.generation, self.step = generation, step

    def verify(self) -> None:
        """Read every byte of the committed generation and compare it with its sums, and headers with the commit.

        Raises:
          CorruptSwap: the first file that is damaged, or of another generation than was committed.
        """
        memory = direct.aligned(max((direct.padded(file.num_bytes) for file in self.every_file), default=0))
        for file in self.every_file:
            self._sums[self.slot(file), file.path] = _verified(file, memory, self.generation, self.step)


def replace(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file so that after any accident either the old or the new one is there, whole."""
    text = json.dumps(content, indent=1).encode()
    fresh = path.with_suffix(".new")
    with open(fresh, "wb") as file:
        file.write(xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """What `replace` wrote.

    Raises:
      CorruptSwap: it is damaged. FileNotFoundError: it was never written.
    """
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest != xxhash.xxh3_64_hexdigest(text).encode():
        fix = "Restore a checkpoint, which writes the swap anew."
        raise CorruptSwap(explain(WHO, "a swap file is not what was written", found=[f"{path}: another XXH3"], fix=fix))
    return json.loads(text)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a run left: the commit, and this process's part of every leaf by its path, each byte compared with its sum. No jax.

    Raises:
      CorruptSwap: a file is damaged, or generations are mixed. FileNotFoundError: nothing was ever committed.
    """
    commit, leaves = load(folder / COMMIT), {}
    for row in load(folder / LAYOUT)["leaves"]:
        file, memory = ShardFile.of(folder, row), direct.aligned(row["bytes"])
        _verified(file, memory, commit["generation"], commit["step"])
        whole = leaves.setdefault(row["leaf"], np.zeros(row["shape"], row["dtype"]))
        bounds = tuple(slice(*one) for one in row["shard"])
        whole[bounds] = memory[: file.num_bytes].view(whole.dtype).reshape(whole[bounds].shape)
    return commit, leaves


def _verified(file: ShardFile, memory: np.ndarray, generation: int, step: int | None) -> list[str]:
    """A file's payload of the committed generation, read into memory; its sums."""
    slot = file.slot(generation)
    header, expected = file.header(slot), (generation, step) if file.num_slots > 1 else (0, None)
    if (header["generation"], header["step"]) != expected:
        met = f"generation {header['generation']} of step {header['step']}"
        raise file.corrupt(f"holds {met}, committed is generation {expected[0]} of step {expected[1]}")
    for (at, part), wanted in zip(file.parts(memory), header["xxh3"], strict=True):
        file.read(slot, at, part, wanted)
    return header["xxh3"]


def opened(folder: Path, leaves: Sequence[Leaf]) -> Swap:
    """The swap that a run left in a folder, for the same leaves on the same shardings; verified byte by byte.

    Raises:
      CorruptSwap: a file is damaged, or generations are mixed. FileNotFoundError: nothing was ever committed.
      ValueError: it is a swap of other leaves.
    """
    layout, commit = load(folder / LAYOUT), load(folder / COMMIT)
    swap = Swap(folder, leaves, run=layout["run"])
    if [file.row for file in swap.every_file] != layout["leaves"] or commit["run"] != swap.run:
        raise ValueError(explain(WHO, "this is the swap of another run", found=[str(folder)], fix="Name another folder."))
    swap.generation, swap.step = commit["generation"], commit["step"]
    swap.verify()
    return swap
