"""Which parameter each collective of a compiled step serves, and the table of them all."""

from collections import defaultdict
from typing import Any

from jzero import _compat, audit, hlo
from jzero.engine.achieved import Subject
from jzero.mesh import batch_axes

MOST_NAMES = 3
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def collectives(subject: Subject) -> list[dict[str, Any]]:
    """Every collective of a step, the one that moves most first."""
    known = _known(subject)
    rows = [_row(one, subject, known) for one in subject.measured.collectives if hlo.group_size(one.groups) > 1]
    return sorted(rows, key=lambda row: -row["wire_bytes"])


def _row(one: hlo.Collective, subject: Subject, known: dict[int, dict[str, set[str]]]) -> dict[str, Any]:
    axis, kind = hlo.axis_of(one.groups, subject.options.mesh), audit.meaning(one)
    over_batch = set(axis.split("+")) <= set(batch_axes(subject.options.mesh))
    return {
        "kind": kind,
        "written_as": one.kind,
        "axis": axis,
        "dtype": one.dtype,
        "arrays": [f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in one.arrays],
        "times": one.count,
        "wire_bytes": audit.wire_bytes(one),
        "loop_depth": one.loop_depth,
        "serves": _serves(one, known) if over_batch and kind in KINDS else [],
        "source": one.source,
    }


def _known(subject: Subject) -> dict[int, dict[str, set[str]]]:
    """Elements of a whole parameter or of a slice that a use takes -> line of the use, or "" -> paths of parameters."""
    known: defaultdict[int, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for index, placement in enumerate(subject.layout.placements):
        if placement.leaf.role == "params":
            known[subject.layout.num_elements(index)][""].add(placement.leaf.path)
    for use in subject.uses:
        line = _compat.where(use.eqn).split(" ")[0]
        known[use.num_elements][line.rsplit("/", 1)[-1]].add(subject.layout.placements[use.leaf].leaf.path)
    return {size: dict(lines) for size, lines in known.items()}


def _serves(one: hlo.Collective, known: dict[int, dict[str, set[str]]]) -> list[str]:
    """For each array the parameters of its size, those used on its line if there are some."""
    line, found = one.source.rsplit("/", 1)[-1], []
    for array in one.arrays:
        lines = known.get(array.elements, {})
        paths = lines.get(line) or {path for paths in lines.values() for path in paths}
        found += sorted(paths)[:MOST_NAMES] + (["..."] if len(paths) > MOST_NAMES else [])
    return list(dict.fromkeys(found))
