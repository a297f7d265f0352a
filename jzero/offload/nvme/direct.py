"""Reads and writes that go past the system's page cache: aligned memory, aligned offsets, whole or an error.

A swap is read once and written once per step and is larger than memory, so the page cache would only evict what others need.
`O_DIRECT` asks for that; file systems that refuse it (some network and overlay ones) get ordinary calls, and `is_direct` says
so.
"""

import errno
import mmap
import os
from typing import NamedTuple

import numpy as np

ALIGN = 4096  # bytes; the largest logical block of today's drives, and a page
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class TruncatedFile(OSError):
    """A file ended before the bytes that were asked for."""


class File(NamedTuple):
    """An open file, and whether its reads and writes go past the page cache."""

    descriptor: int
    is_direct: bool
    path: str

    def read(self, into: np.ndarray, offset: int) -> None:
        """Fill `into` (uint8, aligned) from `offset` (aligned)."""
        view, done = memoryview(into), 0
        while done < len(view):
            got = os.preadv(self.descriptor, [view[done:]], offset + done)
            if not got:
                raise TruncatedFile(errno.EIO, f"{len(view)} bytes from {offset} asked for, {done} are there", self.path)
            done += got

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write `data` (uint8, aligned) at `offset` (aligned)."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwritev(self.descriptor, [view[done:]], offset + done)

    def sync(self) -> None:
        """Return when the data is on the drive, also if power fails."""
        os.fdatasync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def open_file(path: "str | os.PathLike[str]", *, create: bool = False) -> File:
    """A file for reading and writing, direct if its file system allows."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        return File(os.open(path, flags | _O_DIRECT, 0o600), bool(_O_DIRECT), str(path))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return File(os.open(path, flags, 0o600), False, str(path))


def padded(num_bytes: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-num_bytes // ALIGN) * ALIGN


def aligned(num_bytes: int) -> np.ndarray:
    """Zeroed memory that starts on a page: uint8[padded(num_bytes)]."""
    return np.frombuffer(mmap.mmap(-1, max(padded(num_bytes), ALIGN)), np.uint8)
