"""The plan from command line to table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jzero.plan.compiled import CannotCompile, plan_file
from jzero.plan.job import Job, make
from jzero.plan.options import Options, parse, split_step
from jzero.plan.planned import plan_job
from jzero.plan.result import Plan, rendered
from jzero.plan.search import python_of, search
from jzero.report import human
from jzero.topology import parse as parse_target


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; the exit status is 0 for one that was made, fits or not, and 2 for a request that cannot be met."""
    try:
        options = parse(argv)
        parse_target(options.target)
        found = _plan(options)
    except (ValueError, CannotCompile, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    print(found)
    if found.search:
        print(search_table(found.search))
    if options.json:
        Path(options.json).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def _plan(options: Options) -> Plan:
    with _progress() as progress:
        task = progress.add_task(f"planning for {options.target}")

        def tick(said: str) -> None:
            progress.update(task, description=said)

        if options.step is not None:
            file, name = split_step(options.step)
            tick(f"running {file}, then compiling for {options.target}")
            asked: dict[str, Any] = {"target": options.target, "stage": options.stage, "mesh": options.mesh}
            return plan_file(str(file), name, **asked, search=options.search)
        job = job_of(options)
        if options.search:
            return _searched(job, options, tick)
        if not options.closed_form_only:
            tick(f"compiling {job.model} for {job.target}")
        return plan_job(job, compile_too=not options.closed_form_only)


def job_of(options: Options) -> Job:
    """The job that the options name, with defaults."""
    return make(
        options.model or "", options.target, stage=3 if options.stage is None else options.stage, mesh=options.mesh,
        seq=options.seq, batch=options.batch, tokens_per_batch=options.tokens_per_batch, precision=options.precision,
        accumulate=options.accumulate, remat=options.remat,
    )  # fmt: skip


def _searched(job: Job, options: Options, tick: Any) -> Plan:
    found = search(job, compile_best=0 if options.closed_form_only else options.compile_best, tick=tick)
    winner = found["winner"]
    best = Job(**winner["job"]) if winner else job
    plan = plan_job(best, compile_too=False)
    return replace(plan, search=found | ({"python": python_of(winner["job"])} if winner else {}))


def search_table(found: dict[str, Any] | Any) -> str:
    """The Pareto front, the fastest first, and the winner as Python."""
    if "num_candidates" not in found:
        rows = [
            (str(row["stage"]), human(row["peak_bytes"]), human(row["wire"]), "yes" if row["fits"] else "no")
            for row in found["rows"]
        ]
        return "\n" + rendered(("stage", "peak", "wire per step", "fits"), rows)
    rows = [_cells(row) for row in found["rows"]]
    head = (
        f"\n{found['num_candidates']} candidates, {found['num_fitting']} fit by the closed form. The fastest, and smaller ones:"
    )
    names = ("stage", "mesh", "accumulate", "remat", "step", "tokens/s", "MFU", "peak, closed", "compiled")
    return "\n".join([head, rendered(names, rows), found.get("python", "Nothing fits.")])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    job = row["job"]
    mesh = " ".join(f"{axis}={size}" for axis, size in job["mesh"].items())
    rates = (f"{row['step_s']:.3g} s", f"{row['tokens_per_s_per_device']:,.0f}", f"{row['mfu']:.1%}")
    peaks = (human(row["peak_bytes"]), human(row["compiled_peak_bytes"]))
    return (str(job["stage"]), mesh, str(job["accumulate"]), job["remat"], *rates, *peaks)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
