"""The command line: what to time, and the table, JSON and picture of it."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._errors import explain, suggest
from pallas_kernels.bench.cases import cases
from pallas_kernels.bench.measure import measure


def main(argv: Sequence[str] | None = None) -> int:
    """Time what was asked for; 0, or 2 for words that mean nothing."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--op", help="one operation; default: all")
    parser.add_argument("--shape", help="one size of its table, by name; default: all")
    parser.add_argument("--rounds", type=int, help="timed runs of each; default 30, on a CPU 3")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="a bar per implementation; needs matplotlib")
    options = parser.parse_args(argv)
    tiny = jax.default_backend() == "cpu"
    table = cases(tiny=tiny, dtype=jnp.float32 if tiny else jnp.bfloat16)
    try:
        chosen = choose(list(table), options.op, options.shape)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    runs = []
    for op, shape in chosen:
        rows = measure(table[op, shape], tiny=tiny, rounds=options.rounds or (3 if tiny else 30))
        runs.append({"op": op, "shape": shape, "results": rows})
        print(text(runs[-1]), flush=True)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tiny": tiny}
    said = {**device, "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "runs": runs}
    if options.json:
        Path(options.json).write_text(json.dumps(said, indent=1) + "\n")
    if options.plot:
        plot(said, options.plot)
    return 0


def choose(known: Sequence[tuple[str, str]], op: str | None, shape: str | None) -> list[tuple[str, str]]:
    """The cases of an operation and a shape.

    Raises:
      ValueError: there is none.
    """
    chosen = [one for one in known if op in (None, one[0]) and shape in (None, one[1])]
    if chosen:
        return chosen
    ops, shapes = sorted({one for one, _ in known}), sorted({one for _, one in known})
    wrong, names = (shape, shapes) if op is None or op in ops else (op, ops)
    found, context = [f"--op {op} --shape {shape}"], suggest(wrong, names)
    raise ValueError(explain("pallas_kernels.bench", "nothing to time", found=found, context=context, fix="Name one of them."))


def text(run: dict[str, Any]) -> str:
    """One run as lines, each implementation beside the fastest."""
    timed = [row for row in run["results"] if "seconds" in row]
    best = min(row["seconds"]["median"] for row in timed)
    lines = [f"{run['op']} {run['shape']}"]
    for row in timed:
        median, share = row["seconds"]["median"], row["of_roofline"]
        roof = f"{share:5.0%} of the roofline" if share is not None else "no roofline known here"
        ratio = f"{median / best:5.2f} of the best"
        lines.append(
            f"  {row['implementation']:11} {median * 1e3:10.3f} ms  {ratio}  {roof}  temp {row['temp_bytes'] / 1e6:,.1f} MB"
        )
    lines += [f"  {row['implementation']:11} not run: {row['refused']}" for row in run["results"] if "refused" in row]
    return "\n".join(lines)


def plot(said: dict[str, Any], path: str) -> None:
    """Milliseconds, a bar for each implementation of each run, on a logarithmic axis."""
    import importlib

    figures = importlib.import_module("matplotlib.figure")  # wanted here only: the package itself needs jax alone
    bars = [
        (f"{run['op']} {run['shape']}: {row['implementation']}", row["seconds"]["median"] * 1e3)
        for run in said["runs"] for row in run["results"] if "seconds" in row
    ]  # fmt: skip
    figure = figures.Figure(figsize=(9, 0.3 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in bars], [value for _, value in bars])
    axes.set(xlabel="milliseconds, forward and backward", xscale="log", title=f"{said['device']}, jax {said['jax']}")
    axes.invert_yaxis()
    figure.savefig(path)
