"""How the bench gets its devices: a cluster's, this machine's accelerators, or simulated CPU devices."""

import math
import os
import sys
from collections.abc import Mapping, Sequence

import jax

from jzero import launch
from jzero.bench.options import Options
from jzero.launch.environment import COUNT_FLAG, has_accelerator

_MARK = "JZERO_BENCH_SIMULATES"
# XLA:CPU allocates its temporaries anew for every step and glibc returns them to the system: page faults then take a
# quarter of the step. One arena, no mmap, no trimming keeps the memory. Read by the C library when a process starts.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3)}
NUM_SIMULATED = 8


def simulation_environment(environ: Mapping[str, str], num_devices: int) -> dict[str, str]:
    """`environ` with `num_devices` CPU devices and a memory allocator that keeps what it has; the user's settings win."""
    flags = environ.get("XLA_FLAGS", "")
    if COUNT_FLAG not in flags:
        flags = f"{flags} {COUNT_FLAG}={num_devices}".strip()
    # A thread that waits in a collective does no work: with one per device, simulated devices can wait for each other for ever.
    threads = {"PJRT_NPROC": str(2 * num_devices)}
    return {**MALLOC, **threads, **environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", _MARK: "1"}


def simulated() -> bool:
    """Whether this process was started by `get_devices` to simulate devices."""
    return _MARK in os.environ


def get_devices(options: Options, words: Sequence[str]) -> list[jax.Device]:
    """All devices to use. Without an accelerator, starts this program anew, once, with simulated devices."""
    if not simulated():
        _skip_absent_accelerators()
        launch.initialize()
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            environ = simulation_environment(os.environ, options.devices or _num_in_mesh(options.mesh))
            sys.stdout.flush()
            os.execve(sys.executable, [sys.executable, "-m", "jzero.bench", *words], environ)
    return jax.devices()[: options.devices]


def _num_in_mesh(sizes: Mapping[str, int]) -> int:
    product = math.prod(sizes.values())
    return product if "data" in sizes else max(product, NUM_SIMULATED)


def _skip_absent_accelerators() -> None:
    """Where no accelerator has a device file, CUDA's and TPU's compile-only plugins (extra `compile`) need not be asked.

    They would print tracebacks. `JAX_PLATFORMS` in the environment wins, for devices that this does not know.
    """
    if "JAX_PLATFORMS" not in os.environ and not has_accelerator():
        jax.config.update("jax_platforms", "cpu")
