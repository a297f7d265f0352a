"""Checksums of data files while later ones are still being written, so that they cost little at the end of a save.

Orbax's data files get their final name and content once. A digest counts only if the file has not changed between the moment
before it was read and the end of the save.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from etils import epath

_POLL_SECONDS = 0.02

Stamp = tuple[int, int, int]  # inode, bytes, time of the last change


class Early:
    """Digests files in `directory` as they appear, in a thread of its own, until `stop`."""

    def __init__(self, directory: epath.Path, digest: Callable[[epath.Path], dict[str, Any]]):
        self._root, self._digest = directory, digest
        self._found: dict[str, tuple[Stamp, dict[str, Any]]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jzero.checkpoint.early", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more are begun; the one under way is finished."""
        self._stopped.set()
        self._thread.join()

    def known(self, name: str) -> dict[str, Any] | None:
        """The digest of a file, if it was taken from what is there now."""
        stamp, digest = self._found.get(name, (None, None))
        return digest if stamp is not None and stamp == _stamp(self._root / name) else None

    def _run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            for file in self._root.glob("ocdbt.process_*/d/*"):
                name = str(file.relative_to(self._root))
                before = _stamp(file)
                if self._stopped.is_set() or before is None or self._found.get(name, (None,))[0] == before:
                    continue
                try:
                    digest = self._digest(file)
                except OSError:
                    continue  # gone again; the end of the save looks at what is there then
                if before == _stamp(file):
                    self._found[name] = before, digest


def _stamp(file: epath.Path) -> Stamp | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
