"""The bench from command line to table."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jzero.bench import contenders, training
from jzero.bench import plot as plots
from jzero.bench.options import Options, parse
from jzero.bench.peak import higher, peak
from jzero.bench.results import device_name, results
from jzero.bench.setup import Setup, batches, resolve
from jzero.bench.start import get_devices, simulated
from jzero.bench.table import table

_LEAST_WIDTH = 150  # a table that goes to a file or a pipe is not squeezed into 80 columns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status. Without an accelerator this process is replaced by one with simulated devices."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parse(words)
        if options.plot:
            plots.check()
        setup = resolve(options, get_devices(options, words))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = _console()
    if simulated():
        console.print(f"No accelerator here: simulating {setup.num_devices} CPU devices on this machine's cores.")
    found = bench(setup, console, words=words)
    if jax.process_index() == 0:
        console.print(table(found))
        _write(found, options, console)
    return 0


def bench(setup: Setup, console: Console, *, words: Sequence[str] = ()) -> dict[str, Any]:
    """Train every contender and return the figures (`results.results`)."""
    options, devices = setup.options, list(setup.mesh.devices.flat)
    before = peak(devices)
    prepare = {"plain JAX": partial(contenders.plain, setup)} if options.plain else {}
    prepare |= {f"stage {stage}": partial(contenders.staged, setup, stage=stage) for stage in options.stages}
    small = training.fits_side_by_side(setup.model.num_params, setup.num_devices, len(prepare))
    with _progress(console) as progress:
        task = progress.add_task(
            f"{options.model} on {device_name(setup, simulated=simulated())}", total=len(prepare) * options.steps
        )

        def tick(event: contenders.Trial | str) -> None:
            if isinstance(event, str):
                progress.update(task, description=f"compiling {event}")
            else:
                progress.update(task, advance=1, description=f"training {event.label}, loss {event.losses[-1]:.3f}")

        trials = training.run(prepare, partial(batches, setup), options.steps, side_by_side=simulated() and small, tick=tick)
    return results(setup, trials, higher(before, peak(devices)), simulated=simulated(), words=words)


def _console() -> Console:
    console = Console(quiet=jax.process_index() != 0, highlight=False)
    return console if console.is_terminal else Console(quiet=console.quiet, highlight=False, width=_LEAST_WIDTH)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _write(found: dict[str, Any], options: Options, console: Console) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"Wrote {options.json}.")
    if options.plot:
        plots.plot(found, options.plot)
        console.print(f"Wrote {options.plot}.")
