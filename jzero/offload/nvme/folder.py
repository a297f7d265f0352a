"""The folder that a swap lies in: one run at a time, writable, large enough, and how fast its disk is."""

import errno
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jzero._errors import columns, explain
from jzero.offload.nvme import direct
from jzero.offload.nvme.shard_file import PART_BYTES, WHO, CorruptSwap
from jzero.offload.nvme.swap import COMMIT, LAYOUT, load

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

LOCK, STATE = "lock", "state-"
SLOW_BYTES_PER_S = 500e6  # what a SATA drive moves; NVMe drives start at 2 GB/s
SLOW_SECONDS = 1.0  # a step that waits less than this for the disk is no reason to warn
_TRIAL_BYTES = 2**26
_locks: dict[Path, int] = {}  # of this process, until it ends; a lock dies with its process even under SIGKILL


def said(error: OSError, text: str) -> OSError:
    """An error of the system's kind and number that says more than the system does."""
    found = type(error)(text)
    found.errno = error.errno
    return found


def open_for(folder: str) -> Path:
    """This process's part of the folder, locked for this run.

    Raises:
      OSError: it cannot be made or written to. BlockingIOError: another run is using it.
    """
    path = Path(folder).expanduser().absolute() / f"process-{jax.process_index()}"
    if path not in _locks:
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            fix = "Name a folder on a local drive that this user may write to."
            met = [f"{path}: {error.strerror or error}"]
            raise said(error, explain(WHO, "cannot write into the swap folder", found=met, fix=fix)) from error
        try:
            _lock(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        _locks[path] = descriptor
    return path


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "an unknown process"
        fix = "Give every run a swap folder of its own, or end that process first."
        problem = "this is the swap folder of another run"
        raise said(error, explain(WHO, problem, found=[str(path)], context=f"in use by {holder}", fix=fix)) from error
    except OSError:  # a file system without locks
        return
    me = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, me.encode(), 0)


class Left(NamedTuple):
    """What a run that is over left behind."""

    folder: Path
    num_bytes: int
    leaves: frozenset[tuple[Any, ...]]  # (path, shape, dtype) of each; empty if it cannot be told
    said: str


def leftovers(path: Path, mine: set[str]) -> list[Left]:
    """Swaps in this folder that no state of this process (`mine`: names of folders) uses."""
    return [_left(entry) for entry in sorted(path.glob(f"{STATE}*")) if entry.name not in mine]


def _left(folder: Path) -> Left:
    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
    try:
        rows = load(folder / LAYOUT)["leaves"]
        leaves = frozenset((row["leaf"], tuple(row["shape"]), row["dtype"]) for row in rows)
        commit = load(folder / COMMIT)
        said = f"{len(leaves)} leaves at step {commit['step']}"
    except (OSError, CorruptSwap, ValueError, KeyError):
        leaves, said = frozenset[tuple[Any, ...]](), "never complete"
    return Left(folder, sum(sizes), leaves, said)


def take_over(path: Path, mine: set[str], leaves: frozenset[tuple[Any, ...]]) -> list[str]:
    """Remove what an ended run of the same leaves left, whose place this run takes; what was removed, a line each.

    The state that is about to be placed is whole, so nothing in those files can be wanted by this run.

    Raises:
      ValueError: a swap of other leaves, which is somebody else's.
    """
    found = leftovers(path, mine)
    foreign = [left for left in found if left.leaves and left.leaves != leaves]
    if foreign:
        rows = [[left.folder, f"{left.num_bytes:,} bytes", left.said, _example(left, leaves)] for left in foreign]
        fix = f"Name another folder, or delete {foreign[0].folder} if nobody wants it."
        context = f"this run has {len(leaves)} leaves to keep there"
        raise ValueError(explain(WHO, "this is the swap folder of another run", found=columns(rows), context=context, fix=fix))
    for left in found:
        shutil.rmtree(left.folder, ignore_errors=True)
    return [f"{left.folder.name}: {left.said}, {left.num_bytes:,} bytes" for left in found]


def _example(left: Left, leaves: frozenset[tuple[Any, ...]]) -> str:
    name, shape, dtype = min(left.leaves - leaves or left.leaves)
    return f"with {name} {dtype}[{','.join(map(str, shape))}]"


def check_room(path: Path, num_bytes: int, payload_bytes: int, leftover_bytes: int = 0) -> None:
    """The disk has room for both slots of everything.

    Raises:
      OSError: it has not.
    """
    free = shutil.disk_usage(path).free + leftover_bytes
    if num_bytes > free:
        problem = f"the swap needs {num_bytes:,} bytes and {free:,} are free"
        context = f"{payload_bytes:,} bytes of state, in two generations where steps change it: one is always whole"
        share = max(free / num_bytes * 0.95, 0.01)
        fix = f"Free {num_bytes - free:,} bytes, name a larger disk, or offload less: fraction={share:.2f} would fit."
        raise said(OSError(errno.ENOSPC, ""), explain(WHO, problem, found=[str(path)], context=context, fix=fix))


class Speed(NamedTuple):
    """Of a disk, as measured."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    is_direct: bool

    def seconds(self, read_bytes: int, written_bytes: int) -> float:
        """To read and write as many bytes, one after the other."""
        return read_bytes / self.read_bytes_per_s + written_bytes / self.write_bytes_per_s


def measure(path: Path, num_bytes: int, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Write and read a file of up to 64 MiB, no more than a step would move."""
    target, size = path / "trial", min(_TRIAL_BYTES, direct.padded(max(num_bytes, direct.ALIGN)))
    memory = direct.aligned(min(size, PART_BYTES))
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size, np.uint8)  # zeros are fast on drives that compress
    file = direct.open_file(target, create=True)
    try:
        os.posix_fallocate(file.descriptor, 0, size)
        offsets = range(0, size - memory.size + 1, memory.size)
        seconds = []
        for move in (file.write, file.read):
            start = clock()
            for at in offsets:
                move(memory, at)
            if not seconds:
                file.sync()
            seconds.append(max(clock() - start, 1e-9))
    finally:
        file.close()
        target.unlink()
    moved = len(offsets) * memory.size
    return Speed(moved / seconds[0], moved / seconds[1], file.is_direct)


def warn_if_slow(path: Path, speed: Speed, read_bytes: int, written_bytes: int) -> None:
    """Say what a step will cost on a disk that is no NVMe drive."""
    slowest, seconds = min(speed.write_bytes_per_s, speed.read_bytes_per_s), speed.seconds(read_bytes, written_bytes)
    if slowest < SLOW_BYTES_PER_S and seconds > SLOW_SECONDS:
        problem = f"this disk is slow: each step will wait at least {seconds:,.1f} s for it"
        how = "direct I/O" if speed.is_direct else "direct I/O is refused by this file system"
        rates = f"writes {speed.write_bytes_per_s / 1e6:,.0f} MB/s, reads {speed.read_bytes_per_s / 1e6:,.0f} MB/s"
        context = f"{read_bytes:,} bytes are read and {written_bytes:,} written per step; {how}"
        fix = "Name a folder on an NVMe drive, or offload less with fraction=."
        warnings.warn(explain(WHO, problem, found=[f"{path}: {rates}"], context=context, fix=fix), stacklevel=2)
