"""Planning the step of a user's file, in a process of its own: running the file may train, and set what jax reads once.

`python -m jzero.plan.file_worker` reads one JSON line (file, name, target, stage, mesh, search) and prints one, the plan.
"""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from jzero._errors import explain, suggest
from jzero.plan.own import WHO, plan

BATCH_NAMES = ("batch", "window")


def load(file: str, name: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """The step called `name`, `state`, and the batch that a file leaves behind; what it prints goes to stderr."""
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE` does
    sys.argv = [file]
    with contextlib.redirect_stdout(sys.stderr):
        names = runpy.run_path(file)
    missing = [one for one in (name, "state") if one not in names]
    batch = next((names[one] for one in BATCH_NAMES if one in names), None)
    if missing or batch is None:
        found = [f"{file} has no {one!r}" for one in missing + ([] if batch is not None else ["batch or window"])]
        fix = "Leave the step, `state`, and `batch` (a tuple is several arguments) or `window` at the top level."
        context = suggest(missing[0] if missing else "batch", [one for one in names if not one.startswith("_")])
        raise ValueError(explain(WHO, "the module must name its step, state and batch", found=found, context=context, fix=fix))
    return names[name], names["state"], batch if isinstance(batch, tuple) else (batch,)


def main() -> None:
    """One request, one answer; a failure the user can mend is an answer too."""
    asked = json.loads(sys.stdin.readline())
    file, name = asked.pop("file"), asked.pop("name")
    try:
        step, state, batch = load(file, name)
        answer = plan(step, state, *batch, **asked).to_dict()
    except (ValueError, TypeError, NotImplementedError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
