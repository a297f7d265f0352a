"""A checksum for every file of a checkpoint, written before it becomes visible.

Orbax's own format notices a flipped byte in its index but not in the numbers (docs/log.md), so a rotten disk would restore as
wrong weights. XXH3 notices damage ten times faster than SHA-256; neither stops somebody who forges a checkpoint and rewrites
the list. It lies beside the arrays as `checksums.json`; programs that do not know it ignore it.
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from etils import epath

from jzero._errors import columns, explain
from jzero.checkpoint import from_disk
from jzero.checkpoint.naming import WHO

FILE = "checksums.json"
_NUM_THREADS = 4  # xxhash lets other threads run; more do not help one disk
_PIECE_BYTES = 2**22
DATA_FILE_BYTES = 2**27  # of Orbax's files: they are written and digested side by side, and its 2 GB would be one at a time
_OWN = {FILE, "commit_success.txt"}  # the second is Orbax's mark on stores without rename, written after the list


class CorruptCheckpoint(ValueError):
    """A checkpoint's files are not what was written; the message names them."""


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, which also lists checksums when all files are there and the folder is not yet visible."""

    def __init__(self) -> None:
        # Weights do not shrink; compressing them is slower than the disk.
        super().__init__(use_compression=False, type_handler_registry=from_disk.registry())

    def finalize(self, directory: epath.Path) -> None:
        """Called by Orbax on one process, after every process has written."""
        super().finalize(directory)
        (directory / FILE).write_text(json.dumps(digests(directory), indent=1))


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveArgs(ocp.args.PyTreeSave):
    """Orbax finds a handler by the type of its arguments."""


def digests(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """`{file: {"bytes", "xxh3_128"}}` for every file below `directory`."""
    files = sorted(_files(directory))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(files, pool.map(lambda name: _digest(directory / name), files), strict=True))


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    found = []
    for entry in directory.iterdir():
        name = f"{prefix}{entry.name}"
        found += _files(entry, f"{name}/") if entry.is_dir() else [name] if entry.name not in _OWN else []
    return found


def _digest(file: epath.Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return {"bytes": file.stat().length, "xxh3_128": digest.hexdigest()}


def check(directory: epath.Path) -> bool:
    """Compare every file with the list. False if there is no list, as in a checkpoint that plain Orbax wrote.

    Each process reads its share of the files, and all agree on the result.

    Raises:
      CorruptCheckpoint: files missing, truncated or changed.
    """
    if not (directory / FILE).exists():
        return False
    rows = _compare(directory)
    num_bad = len(rows)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        num_bad = int(np.sum(multihost_utils.process_allgather(np.asarray(len(rows)))))
    if num_bad:
        problem = f"{num_bad} files of this checkpoint are damaged"
        raise CorruptCheckpoint(damaged(directory, problem, columns(rows)))
    return True


def _compare(directory: epath.Path) -> list[list[str]]:
    try:
        listed = json.loads((directory / FILE).read_text())
        mine = sorted(listed)[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            said = pool.map(lambda name: _difference(directory / name, listed[name]), mine)
            return [[name, what] for name, what in zip(mine, said, strict=True) if what]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [[FILE, f"cannot be read: {error}"]]


def _difference(file: epath.Path, expected: dict[str, Any]) -> str:
    if not file.exists():
        return "missing"
    length = file.stat().length
    if length != expected["bytes"]:
        return f"{length} bytes, {expected['bytes']} were written"
    return "" if _digest(file) == expected else f"{length} bytes, but not those that were written"


def damaged(directory: epath.Path, problem: str, found: list[str]) -> str:
    """The message for a checkpoint that cannot be trusted."""
    fix = "Restore an older one with at=, or pass on_corrupt='previous' to fall back to the newest that is whole."
    return explain(f"{WHO}: restore", problem, found=found, context=f"checkpoint {directory}", fix=fix)
