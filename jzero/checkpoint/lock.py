"""One job at a time writes into a folder: a lock on a file in it, which the system drops when the process that holds it ends.

Two managers would remove each other's unfinished checkpoints and overwrite the finished ones. The lock is POSIX's (fcntl): it
belongs to the process, dies with it even under SIGKILL, and works over NFS. Object stores have none, and get none.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jzero._errors import explain
from jzero.checkpoint.naming import WHO

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

FILE = ".jzero-lock"
_PATIENCE_SECONDS = 120.0  # an NFS server holds the locks of a host that died for a lease, 90 s by default
# path -> file descriptor, and how its holder in this process gives it up. Closing any descriptor of the file drops the lock.
_held: dict[str, tuple[int, Callable[[], None]]] = {}


def acquire(folder: epath.Path, give_up: Callable[[], None]) -> None:
    """Hold the lock of `folder` for this job, until `release` or the end of process 0.

    Called by every process of the job; process 0 holds the lock, and all of them learn of it. A holder in this same process
    is asked to give it up: `give_up()` finishes what is being written and calls `release`.

    Raises:
      BlockingIOError: another job holds it; the message says which process.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            _acquire(folder, give_up)
        except BlockingIOError as error:
            failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if np.any(multihost_utils.process_allgather(np.asarray(failure is not None))) and failure is None:
            failure = BlockingIOError(_message(folder, {}))
    if failure is not None:
        raise failure


def _acquire(folder: epath.Path, give_up: Callable[[], None]) -> None:
    path = str(folder / FILE)
    if fcntl is None or "://" in path:
        return
    if path in _held:
        _held[path][1]()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me).encode(), 0)
    _held[path] = (descriptor, give_up)


def release(folder: epath.Path) -> None:
    """Let others write."""
    path = str(folder / FILE)
    if path in _held:
        os.close(_held.pop(path)[0])


def _wait_for(descriptor: int, folder: epath.Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either errno
            holder = _holder(descriptor)
            if holder.get("host") in (None, socket.gethostname()) or time.monotonic() > deadline:
                raise BlockingIOError(_message(folder, holder)) from error
            time.sleep(1.0)
        except OSError:  # a file system without locks
            return


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _message(folder: epath.Path, holder: dict[str, Any]) -> str:
    who = "process {pid} on {host}, since {since}".format_map({"pid": "?", "host": "?", "since": "?", **holder})
    fix = "Give every run a folder of its own, or end that process first. Restoring from here needs no lock."
    return explain(
        f"{WHO}: save", "another job writes into this folder", found=[str(folder)], context=f"held by {who}", fix=fix
    )
