"""Compiled figures, kept line by line: a benchmark that is interrupted goes on where it stopped."""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WHEELS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")


def fill(file: Path, lines: Sequence[str], make: Callable[[str], dict[str, Any]], *, only: str = "") -> dict[str, Any]:
    """The rows of `file`, in the order of `lines`, after `make(line)` for those that it lacks; written after each one.

    `only`: make those alone that contain this text.
    """
    found = read(file)
    wanted = [line for line in lines if line not in found["rows"] and only in line]
    for number, line in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {line}", file=sys.stderr, flush=True)
        found["rows"][line] = make(line)
        found["rows"] = {line: found["rows"][line] for line in lines if line in found["rows"]}
        file.write_text(json.dumps(found | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    return found["rows"]


def read(file: Path) -> dict[str, Any]:
    """What was kept, or nothing yet."""
    return json.loads(file.read_text()) if file.exists() else {"versions": versions(), "rows": {}}


def lines(text: str) -> list[str]:
    """A table of settings, one line each."""
    return [line.strip() for line in text.strip().splitlines()]


def versions() -> dict[str, str]:
    """Of what made the programs."""
    return {name: importlib.metadata.version(name) for name in WHEELS}
