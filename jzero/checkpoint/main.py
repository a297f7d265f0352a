"""`python -m jzero.checkpoint ls|verify|diff|export`: look at checkpoints without the program that wrote them."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jzero.checkpoint import checksums, folder, tensors


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 fine, 1 damaged or different, 2 nothing to look at."""
    asked = _parser().parse_args(argv)
    try:
        rows, status = asked.run(asked)
    except checksums.CorruptCheckpoint as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(rows, indent=1))
    else:
        _print(rows)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jzero.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, what, more in (
        ("ls", _ls, "the checkpoints of a folder", ()),
        ("verify", _verify, "compare every file with its checksum", ()),
        ("diff", _diff, "leaves that differ between two checkpoints", ("other",)),
        ("export", _export, "write the parameters as safetensors", ("file",)),
    ):
        command = commands.add_parser(name, help=what, description=what)
        for argument in ("dir", *more):
            command.add_argument(argument)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if name == "export":
            command.add_argument("--only", help="a subtree, such as params/decoder; default: params")
    return parser


def _roots(path: Any) -> list[epath.Path]:
    """A checkpoint itself, or all of a manager's folder."""
    where = folder.absolute(path)
    folder.check_exists(where)
    if folder.arrays_of(where) is not None:
        return [where]
    folder.pick(where, None)  # raises where there is none
    return [where / str(step) for step in folder.steps(where)]


def _ls(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    return [_summary(folder.open_one(root)) for root in _roots(asked.dir)], 0


def _summary(found: folder.Found) -> dict[str, Any]:
    leaves = folder.present(found.arrays).values()
    notes = {name: found.notes.get(name) for name in ("mesh", "stage", "precision", "versions", "data")}
    num_bytes = sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return {"checkpoint": found.root.name, "leaves": len(leaves), "bytes": num_bytes, **notes}


def _verify(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    rows = []
    for root in track(_roots(asked.dir), description="reading", console=Console(stderr=True), transient=True):
        try:
            checked = checksums.check(folder.open_one(root).arrays)
            rows.append({"checkpoint": root.name, "result": "whole" if checked else "no checksums", "message": ""})
        except checksums.CorruptCheckpoint as error:
            rows.append({"checkpoint": root.name, "result": "damaged", "message": str(error)})
    return rows, int(any(row["result"] == "damaged" for row in rows))


def _diff(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    one, other = (folder.open_one(folder.locate(path)).arrays for path in (asked.dir, asked.other))
    left, right = folder.present(one), folder.present(other)
    rows = []
    for name in sorted(left.keys() | right.keys()):
        pair = [_short(leaf) for leaf in (left.get(name), right.get(name))]
        if pair[0] == pair[1]:
            values = [tensors.read_leaf(arrays, name, there[name]) for arrays, there in ((one, left), (other, right))]
            apart = int(np.sum(values[0].reshape(-1).view(np.uint8) != values[1].reshape(-1).view(np.uint8)))
            pair = [*pair, f"{apart} bytes differ"] if apart else []
        if pair:
            rows.append({"leaf": "/".join(name), asked.dir: pair[0], asked.other: pair[1], "note": " ".join(pair[2:])})
    return rows, int(bool(rows))


def _short(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _export(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    return [{"file": asked.file, "tensor": name} for name in tensors.export(asked.dir, asked.file, only=asked.only)], 0


def _print(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no difference")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*["" if value is None else str(value) for value in row.values()])
    Console(highlight=False).print(table)
