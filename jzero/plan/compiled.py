"""Compiling a job in a process of its own, so that its memory goes back to the machine and jax's settings stay the caller's."""

import json
import os
import subprocess
import sys
from typing import Any

from jzero._errors import explain
from jzero.plan import cache
from jzero.plan.job import WHO, Job
from jzero.plan.result import Plan


class CannotCompile(RuntimeError):
    """The compiler of the target is missing or refused the program; the message says what to do."""


def compile_job(job: Job, *, use_cache: bool = True) -> dict[str, Any]:
    """The figures of `worker.measure`, from disk if these versions compiled this job before (`jzero.plan.cache`).

    Raises:
      CannotCompile: no compiler for the target (the message names the extra to install), or one that failed.
    """
    what = f"{job.model} at stage {job.stage} for {job.target}"
    program = job.program()
    found = cache.load(program) if use_cache else None
    if found is None:
        found = ask("jzero.plan.worker", program, what=what)
        cache.store(program, found)
    return found


def plan_file(file: str, name: str, **asked: Any) -> Plan:
    """The plan of a step that a user's file leaves behind (`file_worker`).

    Raises:
      CannotCompile: as above, or the file fails.
    """
    answer = ask("jzero.plan.file_worker", {"file": file, "name": name, **asked}, what=f"{file}:{name}")
    return Plan(**{key: answer[key] for key in Plan.__dataclass_fields__})


def ask(module: str, request: dict[str, Any], *, what: str) -> dict[str, Any]:
    """One JSON line to a module in a process of its own, and its answer."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # or jax looks for a GPU, and compiles for that
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, input=json.dumps(request) + "\n", capture_output=True, text=True, env=environment)
    answer = _last_line(done.stdout)
    if answer is None:
        last = done.stderr.strip().splitlines()[-3:]
        context = f"{what}; its process ended with {done.returncode}"
        fix = "A return code of -9 is a machine without enough memory. --closed-form-only needs no compiler."
        raise CannotCompile(explain(WHO, "the program could not be made or compiled", found=last, context=context, fix=fix))
    if "error" in answer:
        raise CannotCompile(answer["error"])
    return answer


def _last_line(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
