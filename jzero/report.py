"""The report of a sharded step: what was measured on the compiled program beside what the stage promises.

A `Report` is a value made from plain data. The engine fills it in; nothing here computes or compiles.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Figure = Mapping[str, int | None]  # {"measured": bytes, "formula": bytes}
WIDTH = 110
_UNITS = (("GB", 1e9, 1e10), ("MB", 1e6, 1e6), ("kB", 1e3, 1e3))  # unit, its size, the least amount printed in it


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a step costs per device, and per step where something moves. `print` it, or take `to_dict()`."""

    stage: int
    engine: str
    mesh: Mapping[str, int]
    bytes_at_rest: Mapping[str, Figure]  # role -> figure
    wire_bytes: Mapping[str, Mapping[str, Figure]]  # axis -> kind of collective -> figure
    temp_bytes: int
    peak_bytes: int
    peak_in_use: int | None = None  # the most that the devices have had in use so far, where they count it
    peak_buffers: Sequence[Mapping[str, Any]] = ()  # the largest temporaries at the peak: array, bytes, role, source, ...
    memory_timeline: Mapping[str, Sequence[int]] = field(default_factory=dict)  # role -> bytes at moments of the step
    collectives: Sequence[Mapping[str, Any]] = ()  # kind, axis, dtype, arrays, times, wire_bytes, loop_depth, serves, source
    kernels: Sequence[Mapping[str, Any]] = ()  # op, implementation, reason, arrays, calls: which one each call took
    donated: Mapping[str, int] = field(default_factory=dict)  # {"leaves": given back in place, "of": all}
    num_compiled: int = 1  # programs that this step has compiled: one for each state structure and batch shape
    leaves: Sequence[Mapping[str, Any]] = ()  # path, dtype, shape, role, spec, bytes_per_device, why
    offload: Mapping[str, Any] = field(default_factory=dict)  # at_rest, buckets, ...: docs/offload.md
    findings: Sequence[str] = ()
    programs: Mapping[str, Any] = field(default_factory=dict)  # anything else worth keeping, as JSON

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `json.dumps` takes."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        resting = [((role,), figure) for role, figure in self.bytes_at_rest.items()]
        wires = [((axis, kind), figure) for axis, kinds in self.wire_bytes.items() for kind, figure in kinds.items()]
        return "\n".join(
            [
                f"Stage {self.stage}, {self.engine} engine, mesh {mesh}. Everything is per device.",
                "\nBytes at rest",
                render(_figures(("role",), resting)),
                "Bytes on the wire, per step",
                render(_figures(("axis", "collective"), wires)),
                f"Temporaries {human(self.temp_bytes)}, peak {human(self.peak_bytes)}{self._in_use()}",
                self._compiled(),
                *([self._offloaded()] if self.offload else []),
                *(["\nLargest temporaries at the peak", self.buffer_table(5).rstrip()] if self.peak_buffers else []),
                *(["\nKernels", self.kernel_table().rstrip()] if self.kernels else []),
                "\nFindings" if self.findings else "\nNo findings",
                *(textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in self.findings),
            ]
        )

    def _in_use(self) -> str:
        if self.peak_in_use is None:
            return ""
        return f"; the devices have had {human(self.peak_in_use)} in use ({self.peak_in_use / self.peak_bytes:.2f} of it)"

    def _compiled(self) -> str:
        donated = f"{self.donated['leaves']} of {self.donated['of']} state leaves reused in place; " if self.donated else ""
        return f"{donated}{self.num_compiled} program{'s' * (self.num_compiled != 1)} compiled"

    def _offloaded(self) -> str:
        at_rest = ", ".join(f"{memory} {human(size)}" for memory, size in self.offload["at_rest"].items())
        buckets = self.offload["buckets"]
        largest = human(max((bucket["moved_bytes"] for bucket in buckets), default=0))
        moved = human(self.offload["moved_bytes"])
        brought = f"{human(self.offload['brought_bytes'])} brought from files first; " if self.offload["brought_bytes"] else ""
        by_host, back = sum(bucket["update"] == "host" for bucket in buckets), human(self.offload["back_bytes"])
        there = f" ({by_host} of them by the host)" if by_host else ""
        way = "host" if by_host else "device"
        ways = f"{moved} a step each way" if moved == back else f"{moved} a step to the {way} and {back} back"
        if self.offload["fetched_bytes"]:
            fetched, left = human(self.offload["fetched_bytes"]), human(self.offload["left_bytes"])
            brought += f"{fetched} of parameters come at their uses, {left} of gradients leave as they appear; "
        return f"State at rest: {at_rest}; {brought}updated in {len(buckets)} buckets{there} of up to {largest}, {ways}"

    def buffer_table(self, most: int = 10) -> str:
        """The largest temporaries alive when most are, and the line of code that made each."""
        table = _table("array", "for", right=("bytes",), last=("made at",))
        for one in self.peak_buffers[:most]:
            made_at = one["source"].rsplit("/", 1)[-1] or one["op_name"] or one["instruction"]
            table.add_row(one["array"], one["role"], human(one["bytes"]), made_at)
        return render(table)

    def kernel_table(self) -> str:
        """One row per operation that has several implementations: which one its calls take, and why."""
        table = _table("operation", "takes", right=("calls",), last=("of", "because"))
        for one in self.kernels:
            table.add_row(one["op"], one["implementation"], str(one["calls"]), ", ".join(one["arrays"]), one["reason"])
        return render(table)

    def collective_table(self) -> str:
        """One row per collective of the program: what it moves, how often, for which parameter, and from which line."""
        table = _table("collective", "axis", right=("times", "bytes per step"), last=("arrays", "serves", "from"))
        for one in self.collectives:
            kind = one["kind"] if one["kind"] == one["written_as"] else f"{one['kind']} (as {one['written_as']})"
            times = "?" if one["times"] is None else str(one["times"])
            source = one["source"].rsplit("/", 1)[-1]
            cells = (
                kind,
                one["axis"],
                times,
                human(one["wire_bytes"]),
                ", ".join(one["arrays"]),
                ", ".join(one["serves"]),
                source,
            )
            table.add_row(*cells)
        return render(table)

    def plot(self, path: str) -> None:
        """Write a picture: memory over the step by role, and traffic by mesh axis. The ending chooses the format.

        Raises:
          ModuleNotFoundError: without matplotlib (`pip install 'jzero[plot]'`).
        """
        from jzero.picture import draw

        draw(self, path)

    def leaf_table(self) -> str:
        """One row per leaf of the state: what it is, where it lives and why."""
        table = _table("path", "leaf", "role", right=("bytes per device",), last=("spec", "why"))
        for leaf in self.leaves:
            array = f"{leaf.get('dtype', '')}[{','.join(map(str, leaf.get('shape', ())))}]"
            size = human(leaf.get("bytes_per_device"))
            cells = (leaf.get("path", ""), array, leaf.get("role", ""), size, leaf.get("spec", ""), leaf.get("why", ""))
            table.add_row(*map(str, cells))
        return render(table)


def human(num_bytes: float | None) -> str:
    """Bytes as a person reads them, in decimal units: `1,869 MB`, `37.4 MB`, `12.3 GB`."""
    if num_bytes is None:
        return "-"
    for unit, size, least in _UNITS:
        if num_bytes >= least:
            amount = num_bytes / size
            return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _figures(names: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], Figure]]) -> Table:
    """Measured beside formula, and how they compare."""
    table = _table(*names, right=("measured", "formula", "ratio"))
    for row, figure in rows:
        measured, formula = figure.get("measured"), figure.get("formula")
        ratio = f"{measured / formula:.2f}" if measured is not None and formula else "-"
        table.add_row(*row, human(measured), human(formula), ratio)
    return table


def _table(*left: str, right: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> Table:
    """Columns that stay whole, then numbers, then columns that may break over lines."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    kinds: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
        (left, {"no_wrap": True}),
        (right, {"no_wrap": True, "justify": "right"}),
        (last, {}),
    )
    for names, settings in kinds:
        for name in names:
            table.add_column(name, overflow="fold", **settings)
    return table


def render(table: Table) -> str:
    """A table as text without colours, whatever terminal there is."""
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, force_terminal=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | float | int | None):
        return value
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
