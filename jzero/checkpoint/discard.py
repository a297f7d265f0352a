"""Old checkpoints go in two steps: renamed into a folder of their own, then deleted there.

A job that dies while it deletes thus leaves no half-deleted checkpoint under a number (docs/log.md). Object stores, which
cannot rename, delete at once.
"""

import shutil
import threading

import jax
from etils import epath

FOLDER = ".jzero-deleted"


def folder_for(path: epath.Path) -> str | None:
    """Where Orbax moves what is not kept, relative to `path`."""
    return None if "://" in str(path) else FOLDER


def empty(path: epath.Path) -> threading.Thread:
    """Delete what was moved there, this job's and a dead one's; in a thread, for it may take seconds."""
    thread = threading.Thread(target=_empty, args=(path / FOLDER,), name="jzero.checkpoint.discard")
    thread.start()
    return thread


def _empty(folder: epath.Path) -> None:
    if jax.process_index() == 0 and "://" not in str(folder) and folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # what stays is tried again with the next save
