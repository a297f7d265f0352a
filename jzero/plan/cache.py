"""Compiled figures kept on disk: a job, these versions and this source compile to the same program every time."""

import hashlib
import importlib.metadata
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pallas_kernels

_WHEELS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax")


def folder() -> Path:
    """`$XDG_CACHE_HOME/jzero/plan`, by default `~/.cache/jzero/plan`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jzero" / "plan"


def load(job: dict[str, Any]) -> dict[str, Any] | None:
    """What was stored for `job`, or None; an unreadable file is as good as none."""
    try:
        return json.loads(_file(job).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def store(job: dict[str, Any], figures: dict[str, Any]) -> None:
    """Keep `figures`; a folder that cannot be written costs the next compilation and nothing else."""
    file = _file(job)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(figures))
        part.replace(file)  # in one piece, for several searches may run at once
    except OSError:
        part.unlink(missing_ok=True)


def _file(job: dict[str, Any]) -> Path:
    text = json.dumps([job, _versions()], sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@cache
def _versions() -> list[str]:
    """Of every wheel that has a part in the program, and of our own source."""
    source = hashlib.sha256()
    for package in (Path(__file__).resolve().parent.parent, Path(pallas_kernels.__file__).resolve().parent):
        for file in sorted(file for file in package.rglob("*") if file.suffix in (".py", ".json")):
            source.update(file.read_bytes())
    return [*(f"{wheel} {_version(wheel)}" for wheel in _WHEELS), source.hexdigest()]


def _version(wheel: str) -> str:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return "-"
