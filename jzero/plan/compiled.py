"""Compiling a job in a process of its own, so that its memory goes back to the machine and jax's settings stay the caller's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jzero._errors import explain
from jzero.plan.job import WHO, Job


class CannotCompile(RuntimeError):
    """The compiler of the target is missing or refused the program; the message says what to do."""


def compile_job(job: Job, *, run: Callable[..., Any] = subprocess.run) -> dict[str, Any]:
    """The figures of `worker.measure`.

    Raises:
      CannotCompile: no compiler for the target (the message names the extra to install), or one that failed.
    """
    # Without JAX_PLATFORMS jax looks for a GPU; eight or more described devices need no thread of their own.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jzero.plan.worker"]
    done = run(command, input=json.dumps(job.to_dict()) + "\n", capture_output=True, text=True, env=environment)
    answer = _last_line(done.stdout)
    if answer is None:
        last = done.stderr.strip().splitlines()[-3:]
        context = f"{job.model} at stage {job.stage} for {job.target}; the compiler's process ended with {done.returncode}"
        fix = "A return code of -9 is a machine without enough memory. --closed-form-only needs no compiler."
        raise CannotCompile(explain(WHO, "the program could not be compiled", found=last, context=context, fix=fix))
    if "error" in answer:
        raise CannotCompile(answer["error"])
    return answer


def _last_line(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
