"""Folders on disk: which checkpoints there are, where their arrays and notes lie, and the errors when they are not there.

A manager's folder holds `500/`, `1000/`, ...; each of these, and what `jzero.save` writes, holds `state/` (arrays, in Orbax's
layout) and `jzero/` (notes). A folder that plain Orbax wrote holds the arrays itself, or in `default/` where
its manager wrote it.
"""

from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from jzero._errors import explain
from jzero.checkpoint import checksums, notes
from jzero.checkpoint.naming import WHO, Name, unnest

STATE, NOTES = "state", "jzero"


class Found(NamedTuple):
    """One checkpoint on disk. `notes` is empty where jzero did not write it."""

    root: epath.Path
    arrays: epath.Path
    notes: dict[str, Any]


def absolute(path: Any) -> epath.Path:
    """Orbax wants no relative paths; `gs://` and the like stay."""
    return epath.Path(path).expanduser().resolve()


def steps(folder: epath.Path) -> list[int]:
    """The complete checkpoints of a manager's folder, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def arrays_of(root: epath.Path) -> epath.Path | None:
    """The folder of the arrays, or None if `root` is no checkpoint."""
    for name in (STATE, "default"):
        if (root / name).is_dir():
            return root / name
    return root if (root / "_METADATA").exists() else None


def open_one(root: epath.Path) -> Found:
    """The checkpoint in `root`.

    Raises:
      ValueError: a newer format; `CorruptCheckpoint` where the notes are lost or damaged.
    """
    arrays = arrays_of(root)
    if arrays is None:
        raise checksums.CorruptCheckpoint(checksums.damaged(root, "this folder holds no arrays", [f"no {STATE}/ in {root}"]))
    file = root / NOTES / "metadata"
    if file.exists():
        return Found(root, arrays, notes.read(file))
    if (arrays / checksums.FILE).exists():
        raise checksums.CorruptCheckpoint(checksums.damaged(root, "1 file is missing", [f"{NOTES}/metadata"]))
    return Found(root, arrays, {})


def locate(path: Any) -> epath.Path:
    """The checkpoint that `path` is, or the newest complete one of a manager's folder."""
    folder = absolute(path)
    check_exists(folder)
    if arrays_of(folder) is not None:
        return folder
    return folder / str(pick(folder, None))


def pick(folder: epath.Path, at: int | None) -> int:
    """The step to read: `at`, or the newest complete one."""
    check_exists(folder)
    there = steps(folder)
    if not there:
        unfinished = sorted(entry.name for entry in folder.iterdir() if "orbax-checkpoint-tmp" in entry.name)
        found = [f"{name} was never finished" for name in unfinished] or ["the folder holds no checkpoint"]
        fix = "Save one with CheckpointManager.save(i, state) and wait(), or name the folder that holds them."
        raise FileNotFoundError(explain(f"{WHO}: restore", f"no complete checkpoint in {folder}", found=found, fix=fix))
    if at is None:
        return there[-1]
    if at not in there:
        context = f"steps there: {', '.join(map(str, there))}"
        fix = f"Pass at={min(there, key=lambda step: abs(step - at))}, or leave at= out for the newest."
        problem = f"no checkpoint of step {at!r}"
        raise FileNotFoundError(explain(f"{WHO}: restore", problem, found=[f"folder {folder}"], context=context, fix=fix))
    return at


def check_exists(folder: epath.Path) -> None:
    """Raise unless `folder` is a folder."""
    if not folder.is_dir():
        met = "is a file" if folder.exists() else "does not exist"
        fix = "Check the path: relative ones start at the folder that the program was started in."
        raise FileNotFoundError(explain(f"{WHO}: restore", "no checkpoint folder", found=[f"{folder} {met}"], fix=fix))


def present(arrays: epath.Path) -> dict[Name, Any]:
    """What is stored: name -> shape and dtype, read from the index alone."""
    return {name: leaf for name, leaf in unnest(tree(arrays)).items() if getattr(leaf, "shape", None) is not None}


def tree(arrays: epath.Path) -> Any:
    """What is stored, in the containers it was written from: dicts and lists."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(arrays).tree
    except Exception as error:  # whatever Orbax stumbles over, the index cannot be read
        found = [f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"]
        raise checksums.CorruptCheckpoint(checksums.damaged(arrays, "the index cannot be read", found)) from error
