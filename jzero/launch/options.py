"""The launcher's command line, checked before anything starts."""

import argparse
import os
from collections.abc import Sequence
from typing import NamedTuple

from jzero._errors import explain

WHO = "jzero.launch"
_EPILOG = """exit codes: 0 all ranks ended well; 143 preempted (SIGTERM) and saved: start it again; 124 a step did not end in
--step-timeout; 130 interrupted; 2 bad usage; else the code of the first rank that failed, 128 + n where signal n ended it."""


class Options(NamedTuple):
    """What was asked for."""

    processes: int
    devices_per_process: int | None
    max_restarts: int
    min_processes: int
    step_timeout: float | None
    grace: float
    backoff: float
    module: bool
    script: str
    args: tuple[str, ...]


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from command-line words.

    Raises:
      ValueError: numbers that do not fit each other, or a script that does not exist.
      SystemExit: `--help`, or words that argparse does not know.
    """
    asked = vars(_parser().parse_args(argv))
    asked["args"] = tuple(asked["args"])
    asked["min_processes"] = asked["min_processes"] or asked["processes"]
    options = Options(**asked)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    description = "Start a training script as several local processes that find each other through jax.distributed."
    parser = argparse.ArgumentParser(prog="python -m jzero.launch", description=description, epilog=_EPILOG)
    add = parser.add_argument
    add("-n", "--processes", type=int, default=1, help="how many processes")
    add(
        "--devices-per-process",
        type=int,
        help="simulated CPU devices (default 1), or accelerators for each (default: all to one process)",
    )
    add("--max-restarts", type=int, default=0, help="how often to start anew after a death")
    add(
        "--min-processes", type=int, help="after a death go on with what is left, if that is as many; default: always start all"
    )
    add(
        "--step-timeout", type=float, metavar="S", help="seconds after which a step counts as hanging: all stacks, then failure"
    )
    add("--grace", type=float, default=30.0, metavar="S", help="seconds between SIGTERM and SIGKILL")
    add(
        "--backoff",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before the first restart; doubled each time, at most 60",
    )
    add("-m", dest="module", action="store_true", help="the script is a module's name")
    add("script")
    add("args", nargs=argparse.REMAINDER)
    return parser


def _check(options: Options) -> None:
    positive = [("-n", options.processes), ("--min-processes", options.min_processes), ("--grace", options.grace)]
    positive += [("--devices-per-process", options.devices_per_process), ("--step-timeout", options.step_timeout)]
    found = [f"{name} {value}: not positive" for name, value in positive if value is not None and value <= 0]
    found += [f"{name} {value}: negative" for name, value in
              [("--max-restarts", options.max_restarts), ("--backoff", options.backoff)] if value < 0]  # fmt: skip
    if options.min_processes > options.processes:
        found.append(f"--min-processes {options.min_processes}: more than -n {options.processes}")
    if not options.module and not os.path.isfile(options.script):
        found.append(f"{options.script}: there is no such file")
    if found:
        fix = "python -m jzero.launch -n 4 train.py --its-own arguments; see --help."
        raise ValueError(explain(WHO, "the job cannot be started as asked", found=found, context=f"in {os.getcwd()}", fix=fix))
