"""The plan from command line to table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jzero.plan.compiled import CannotCompile, plan_file
from jzero.plan.job import Job, make
from jzero.plan.options import Options, parse, split_step
from jzero.plan.pasted import python_of
from jzero.plan.planned import plan_job
from jzero.plan.result import Plan, rendered
from jzero.plan.search import dollars_per_1e9_tokens, search
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
        task = progress.add_task(f"planning for {options.target}", total=1)

        def tick(done: int, total: int, said: str) -> None:
            progress.update(task, completed=done, total=total, description=said)

        if options.step is not None:
            file, name = split_step(options.step)
            tick(0, 1, f"running {file}, then compiling for {options.target}")
            asked: dict[str, Any] = {"target": options.target, "stage": options.stage, "mesh": options.mesh}
            return plan_file(str(file), name, **asked, search=options.search)
        job = job_of(options)
        if options.search:
            return _searched(job, options, tick)
        if not options.closed_form_only:
            tick(0, 1, f"compiling {job.model} for {job.target}")
        return _priced(plan_job(job, compile_too=not options.closed_form_only), options)


def job_of(options: Options) -> Job:
    """The job that the options name, with defaults."""
    return make(
        options.model or "", options.target, stage=3 if options.stage is None else options.stage, mesh=options.mesh,
        seq=options.seq, batch=options.batch, tokens_per_batch=options.tokens_per_batch, precision=options.precision,
        accumulate=options.accumulate, remat=options.remat, schedule=options.schedule, offload=options.offload,
        host_memory=options.host_memory, disk=options.disk, disk_bandwidth=options.disk_bandwidth, any_split=options.search,
    )  # fmt: skip


def _searched(job: Job, options: Options, tick: Any) -> Plan:
    found = search(
        job,
        compile_best=0 if options.closed_form_only else options.compile_best,
        vary_batch=options.batch is None and options.tokens_per_batch is None,
        memory_limit=None if options.memory_limit is None else int(options.memory_limit * 1e9),
        tick=tick,
    )
    winner = found["winner"]
    best = Job.of(winner["job"]) if winner else job
    plan = plan_job(best, compile_too=bool(winner and winner["compiled_peak_bytes"]))  # from the cache, then
    if options.price is not None:
        for row in found["rows"]:
            row["dollars_per_1e9_tokens"] = dollars_per_1e9_tokens(options.price, row["tokens_per_s_per_device"])
    python = {"python": python_of(winner["job"])} if winner else {}
    return _priced(replace(plan, search=found | python), options)


def _priced(plan: Plan, options: Options) -> Plan:
    if options.price is None or plan.time is None:
        return plan
    dollars = dollars_per_1e9_tokens(options.price, plan.time["tokens_per_s_per_device"])
    return replace(plan, time={**plan.time, "dollars_per_1e9_tokens": dollars})


def search_table(found: dict[str, Any] | Any) -> str:
    """The Pareto front, the fastest first, and the winner as Python."""
    if "num_candidates" not in found:
        rows = [
            (str(row["stage"]), human(row["peak_bytes"]), human(row["wire"]), "yes" if row["fits"] else "no")
            for row in found["rows"]
        ]
        return "\n" + rendered(("stage", "peak", "wire per step", "fits"), rows)
    shows_offload = any("offload" in row["job"] for row in found["rows"])
    rows = [_cells(row, shows_offload) for row in found["rows"]]
    tried = f"{found['num_candidates']} candidates, {found['num_fitting']} fit by the closed form."
    head = f"\n{tried} The fastest, and smaller ones:"
    away = ("offload",) if shows_offload else ()
    priced = ("$/1e9 tokens",) if found["rows"] and "dollars_per_1e9_tokens" in found["rows"][0] else ()
    settings = ("stage", "mesh", "sequences", "k", "remat", *away)
    names = (*settings, "step", "tokens/s", "MFU", *priced, "peak, closed", "compiled")
    return "\n".join([head, rendered(names, rows), found.get("python", "Nothing fits.")])


def _cells(row: dict[str, Any], shows_offload: bool) -> tuple[str, ...]:
    job = row["job"]
    mesh = " ".join(f"{axis}={size}" for axis, size in job["mesh"].items())
    rates = [f"{row['step_s']:.3g} s", f"{row['tokens_per_s_per_device']:,.0f}", f"{row['mfu']:.1%}"]
    rates += [f"{row['dollars_per_1e9_tokens']:,.0f}"] if "dollars_per_1e9_tokens" in row else []
    peaks = (human(row["peak_bytes"]), human(row["compiled_peak_bytes"]))
    one = Job.of(job)
    short = {"opt_state": "opt", "params": "params", "activations": "acts"}
    roles = [word for name, word in short.items() if one.offload and getattr(one.offload, name)]
    away = ["+".join(roles) or "-"] if shows_offload else []
    return (str(one.stage), mesh, str(one.micro_sequences), str(one.accumulate), one.remat, *away, *rates, *peaks)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
