"""Eight CPU devices for every test, set before jax is imported anywhere."""

import gc
import itertools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("PJRT_NPROC", "64")  # fewer threads than devices wait for each other can deadlock: docs/log.md
NUM_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if NUM_DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NUM_DEVICES_FLAG}=8".strip()

MAPS = Path("/proc/self/maps")  # Linux
MOST_MAPS = 40_000  # a process may have 65,530 (vm.max_map_count); one more, and the compiler ends in a segmentation fault
EVERY = 16  # tests; one of the hungriest makes 1,100
tests_since = itertools.count(1)


def pytest_runtest_teardown(item, nextitem):
    """Programs compiled for CPU hold hundreds of memory maps each, and JAX keeps them all: let them go in time."""
    if next(tests_since) % EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
