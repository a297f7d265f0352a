"""Timing: implementations take turns, inputs rotate through more memory than the cache holds, medians of many."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.bench.cases import Case

_ROTATING_BYTES = 256 * 2**20  # beyond every last-level cache met so far (an H100's has 50 MB)
_MOST_INPUTS = 16

# device kind -> (operations per second in bf16, bytes per second), measured ceilings of a large matmul and a large copy.
ROOFLINES = {"NVIDIA H100 80GB HBM3": (798e12, 3.0e12), "NVIDIA H200": (788e12, 4.3e12)}


def inputs(case: Case, *, tiny: bool) -> list[tuple[jax.Array, ...]]:
    """Enough different inputs that one is not in the cache when its turn comes again."""
    first = case.make(jax.random.key(0))
    size = sum(array.nbytes for array in first)
    number = 2 if tiny else min(_MOST_INPUTS, 1 + -(-_ROTATING_BYTES // size))
    return [first, *[case.make(jax.random.key(seed)) for seed in range(1, number)]]


def measure(case: Case, *, tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """One row per implementation and rival: median, least and most seconds, or why it did not run."""
    arrays, ready, found = inputs(case, tiny=tiny), {}, []
    for name in case.op.table:
        try:
            ready[name] = jax.jit(case.run(name)).lower(*arrays[0]).compile()
        except NotImplementedError as error:
            found.append({"implementation": name, "refused": str(error).splitlines()[1].strip()})
    for name, rival in case.rivals.items():
        if rival is None:
            found.append({"implementation": name, "refused": f"{name} is not installed"})
        else:
            ready[name] = jax.jit(rival).lower(*arrays[0]).compile()
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 2):
        for name, run in ready.items():
            taken = _once(run, arrays[turn % len(arrays)])
            seconds[name] += [taken] if turn >= 2 else []  # the first two warm up
    return [*[_row(name, ready[name], times, case) for name, times in seconds.items()], *found]


def _once(run: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    return time.perf_counter() - start


def _row(name: str, compiled: Any, times: list[float], case: Case) -> dict[str, Any]:
    median = statistics.median(times)
    row = {"implementation": name, "seconds": {"median": median, "min": min(times), "max": max(times)}}
    row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    roofline = ROOFLINES.get(jax.devices()[0].device_kind)
    least = max(case.flops / roofline[0], case.num_bytes / roofline[1]) if roofline else None
    return {**row, "roofline_seconds": least, "of_roofline": least / median if least else None}
