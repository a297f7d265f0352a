"""What compiling may take of this machine: how many compilers at once."""

import os

# The largest compiler measured took 2.0 GB (Llama 8B in float32 for 64 v5p chips, docs/log.md); twice that is safe.
COMPILER_BYTES = 4 * 2**30
_SHARE = 0.8  # of what is free


def num_compilers(memory_limit: int | None = None) -> int:
    """Compilers that may run side by side: one a core, and no more than `memory_limit` bytes hold; at least one."""
    room = free_bytes() * _SHARE if memory_limit is None else memory_limit
    return max(1, min(os.cpu_count() or 1, int(room // COMPILER_BYTES)))


def free_bytes() -> int:
    """Memory that a new process can have; all there is, where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
