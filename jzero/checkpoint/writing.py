"""What a state becomes on its way to disk, checked before anything is written."""

import re
import tempfile
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jzero._errors import explain
from jzero.checkpoint import checksums, naming, notes
from jzero.checkpoint.naming import WHO
from jzero.engine.statics import split_statics
from jzero.shard import ShardedStep

_REASON = re.compile(r"\[OS error [^\]]*\]")  # as TensorStore says it


def items(state: Any, *, step: ShardedStep | None, number: int | None = None, data: Any = None) -> ocp.args.Composite:
    """Orbax's arguments: the arrays under their names, the notes as JSON. Static leaves are left out.

    Raises:
      ValueError: a leaf that was donated; two leaves of one name. TypeError: a data position that is not JSON.
    """
    arrays, _ = split_statics(state)
    _check_alive(arrays)
    leaves = zip(naming.names(arrays), jax.tree.leaves(arrays), strict=True)
    tree = naming.nest({name: naming.to_disk(leaf) for name, leaf in leaves})
    beside = notes.write(state, step=step, number=number, data=data)
    saved = checksums.SaveArgs(tree, ocdbt_target_data_file_size=checksums.DATA_FILE_BYTES)
    return ocp.args.Composite(state=saved, jzero=ocp.args.JsonSave(beside))


def _check_alive(arrays: Any) -> None:
    leaves = zip(naming.names(arrays), jax.tree.leaves(arrays), strict=True)
    gone = ["/".join(name) for name, leaf in leaves if isinstance(leaf, jax.Array) and leaf.is_deleted()]
    if gone:
        found = [*gone[:5], *([f"... {len(gone) - 5} more"] if len(gone) > 5 else [])]
        fix = "Save the state that the step returned: state, aux = step(state, batch); manager.save(i, state)."
        raise ValueError(explain(f"{WHO}: save", f"{len(gone)} leaves were donated to a step already", found=found, fix=fix))


def check_writable(folder: epath.Path) -> None:
    """Make the folder and a file in it, or say why that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "://" not in str(folder):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = "cannot write into this folder"
        fix = "Name a folder that this user may write to, or change its permissions. Restoring needs none."
        raise type(error)(explain(f"{WHO}: save", problem, found=[f"{folder}: {error.strerror or error}"], fix=fix)) from error


def failed(error: Exception | ExceptionGroup, context: str) -> OSError:
    """The error of a save that did not come to its end."""
    while isinstance(error, ExceptionGroup):  # of Orbax's parallel writes, which fail for one reason
        error = error.exceptions[0]
    said = str(error).partition("\n")[0]
    if len(said) >= 240:  # paths first; what the system said at its end, or before a description of the array
        reason = _REASON.search(said)
        said = f"{said[:80]} ... {reason.group() if reason else said[-150:]}"
    met = [f"{type(error).__name__}: {said}"]
    fix = "Free space or name another folder, then save again: the state in memory is unharmed."
    return OSError(explain(f"{WHO}: save", "a checkpoint could not be written", found=met, context=context, fix=fix))
