"""Ways to move a swap to a disk and back: `dd`, plain calls from threads with and without O_DIRECT, and tensorstore.

    python benchmarks/offload_io.py [--mb 1024] [--repeats 3] [--folder DIR] [--json FILE]

All write and read as many random bytes in the same folder, taking turns; a file for each of `--files` shards. Writes end with
fsync.
Pages of a file are dropped from the system's cache before it is read, or ordinary reads would never touch the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jzero.offload.nvme import direct

PIECE_BYTES = 2**24


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="bytes moved each way, in 2^20")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's for temporary files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    size = options.mb * 2**20 // options.files
    ways = {"dd, direct": Dd(folder, size, options.files)}
    ways |= {f"direct, {n} threads": Calls(folder, size, options.files, n, True) for n in (1, 2, 4, 8)}
    ways |= {"page cache, 4 threads": Calls(folder, size, options.files, 4, False)}
    ways |= {f"tensorstore {driver}": Tensorstore(folder, size, options.files, driver) for driver in ("zarr", "zarr3")}
    seconds = {name: {"write": [], "read": []} for name in ways}
    try:
        for _ in range(options.repeats):
            for name, way in ways.items():
                for kind in ("write", "read"):
                    os.sync()
                    forget_pages(folder)
                    start = time.perf_counter()
                    getattr(way, kind)()
                    seconds[name][kind].append(time.perf_counter() - start)
    finally:
        shutil.rmtree(folder)
        ways["dd, direct"].source.unlink()
    rows = {
        name: {f"{kind}_mb_per_s": round(options.mb * 2**20 / 1e6 / statistics.median(times)) for kind, times in kinds.items()}
        for name, kinds in seconds.items()
    }
    found = {"rows": rows, "seconds": seconds, "mb": options.mb, "files": options.files, "cores": os.cpu_count(),
             "load_at_end": [round(one, 2) for one in os.getloadavg()], "date": time.strftime("%Y-%m-%d"),
             "command": " ".join(["python", *sys.argv])}  # fmt: skip
    print(json.dumps({name: found[name] for name in ("rows", "load_at_end", "command")}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def forget_pages(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Dd:
    """One file after the other, 8 MiB at a time."""

    def __init__(self, folder, size, num_files):
        self.files, self.count = [folder / f"dd{i}" for i in range(num_files)], size // 2**23
        self.source = Path("/dev/shm") / f"jzero-{os.getpid()}"  # memory: making random bytes is slower than disks
        self.source.write_bytes(np.random.default_rng(0).bytes(size))
        for path in self.files:
            path.write_bytes(b"")
            os.truncate(path, 0)

    def write(self):
        for path in self.files:
            self._run(f"if={self.source}", f"of={path}", "oflag=direct", "conv=notrunc,fsync")

    def read(self):
        for path in self.files:
            self._run(f"if={path}", "of=/dev/null", "iflag=direct")

    def _run(self, *arguments):
        subprocess.run(["dd", "bs=8M", f"count={self.count}", *arguments], check=True, capture_output=True)


class Calls:
    """`preadv` and `pwritev` of 16 MiB from a pool of threads, a buffer for each thread."""

    def __init__(self, folder, size, num_files, num_threads, is_direct):
        self.pool = ThreadPoolExecutor(num_threads)
        self.buffers = [direct.aligned(PIECE_BYTES) for _ in range(num_threads)]
        for buffer in self.buffers:
            buffer[:] = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, np.uint8)
        self.free = list(self.buffers)
        paths = [folder / f"calls{num_threads}{is_direct}{i}" for i in range(num_files)]
        self.files = [direct.open_file(path, create=True) for path in paths]
        for file in self.files:
            os.posix_fallocate(file.descriptor, 0, size)
        if not is_direct:
            self.files = [direct.File(os.open(path, os.O_RDWR), False, str(path)) for path in paths]
        self.pieces = [(file, at) for file in self.files for at in range(0, size, PIECE_BYTES)]

    def write(self):
        self._each(lambda file, buffer, at: file.write(buffer, at))
        list(self.pool.map(lambda file: file.sync(), self.files))

    def read(self):
        self._each(lambda file, buffer, at: file.read(buffer, at))

    def _each(self, move):
        def one(piece):
            buffer = self.free.pop()
            move(piece[0], buffer, piece[1])
            self.free.append(buffer)

        list(self.pool.map(one, self.pieces))


class Tensorstore:
    """Arrays of float32 without compression, in chunks of 16 MiB, as Orbax would keep them."""

    def __init__(self, folder, size, num_files, driver):
        import tensorstore

        self.arrays, self.value = [], np.random.default_rng(0).random(size // 4, np.float32)
        chunk = PIECE_BYTES // 4
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        zarr3 = {"shape": [size // 4], "data_type": "float32", "codecs": [little],
                 "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}}}  # fmt: skip
        zarr = {"shape": [size // 4], "dtype": "<f4", "chunks": [chunk], "compressor": None, "fill_value": None}
        for i in range(num_files):
            spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(folder / f"{driver}{i}")},
                    "metadata": zarr if driver == "zarr" else zarr3}  # fmt: skip
            self.arrays.append(tensorstore.open(spec, create=True, delete_existing=True).result())

    def write(self):
        for future in [array.write(self.value) for array in self.arrays]:
            future.result()

    def read(self):
        for future in [array.read() for array in self.arrays]:
            future.result()


if __name__ == "__main__":
    main()
