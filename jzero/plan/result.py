"""A plan as a value: what a run would need, closed form and compiled side by side. `print` it, or take `to_dict()`."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from jzero.report import WIDTH, human, render


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of a run would need of each device of a target. Bytes are per device; traffic is per step."""

    job: Mapping[str, Any]
    target: str
    device_bytes: int  # memory of one device
    usable_bytes: int  # what a program can have of it
    closed: Mapping[str, Any] | None = None  # at_rest, wire, temp_bytes, peak_bytes, parts, moment; None for a user's own step
    compiled: Mapping[str, Any] | None = None  # the same from the compiled program, with findings; None when not asked for
    budgets: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict
    )  # "host", "disk": need, have, missing; a device's share
    time: Mapping[str, Any] | None = None  # compute_s, wire_s, update_s, step_s, tokens_per_s_per_device, mfu, bound
    changes: Sequence[Mapping[str, Any]] = ()  # what would make it fit: flags, peak_bytes, step_s
    notes: Sequence[str] = ()
    search: Mapping[str, Any] = field(default_factory=dict)  # rows and the winner, when asked for

    @property
    def peak_bytes(self) -> int:
        """The compiled figure where there is one."""
        return int((self.compiled or self.closed or {})["peak_bytes"])

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def short(self) -> dict[str, int]:
        """Which budgets are short, and by how many bytes: `"device"`, `"host"`, `"disk"`."""
        every = {"device": self.missing_bytes, **{name: one["missing"] for name, one in self.budgets.items()}}
        return {name: missing for name, missing in every.items() if missing}

    @property
    def missing_bytes(self) -> int:
        """What a device's memory lacks; 0 when the step fits there."""
        return max(0, self.peak_bytes - self.usable_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `json.dumps` takes."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        verdict = {"fits": self.fits, "short": self.short, "missing_bytes": self.missing_bytes, "peak_bytes": self.peak_bytes}
        return fields | verdict

    def __str__(self) -> str:
        return "\n".join(
            [
                self._title(),
                "",
                *self._memory(),
                *self._elsewhere(),
                *self._traffic(),
                *self._speed(),
                *self._verdict(),
                *self._lines(),
            ]
        )

    def _title(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.job.items() if name not in ("target", "mesh"))
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.job.get("mesh", {}).items())
        return textwrap.fill(f"{said}, mesh {mesh}, on {self.target}. Everything is per device.", WIDTH)

    def _memory(self) -> list[str]:
        closed, compiled = self.closed or {}, self.compiled or {}
        rows = [
            (f"{role} at rest", closed.get("at_rest", {}).get(role), compiled.get("at_rest", {}).get(role))
            for role in _keys(closed.get("at_rest"), compiled.get("at_rest"))
        ]
        rows += [(name, closed.get(f"{key}_bytes"), compiled.get(f"{key}_bytes")) for name, key in _TOTALS]
        return ["Memory", render(_table("", rows))]

    def _elsewhere(self) -> list[str]:
        closed, compiled = (self.closed or {}).get("offload"), (self.compiled or {}).get("offload") or {}
        if not closed:
            return []
        moved, back = closed["moved_bytes"], closed["back_bytes"]
        ways = [("moved each way in a step", moved, compiled.get("moved_bytes"))]
        if moved != back:
            to = f"to the {self.job.get('offload', {}).get('update', 'device')} for the update"
            ways = [(to, moved, compiled.get("moved_bytes")), ("back", back, compiled.get("back_bytes"))]
        rows = [
            ("rests in host memory", closed["host_moved_bytes"], compiled.get("at_rest", {}).get("pinned_host")),
            ("rests on disk, two slots", closed["disk_bytes"], None),
            ("the pool of the disk", closed["pool_bytes"], None),
            ("saved activations", closed["activation_bytes"], None),
            ("leaves on their way", closed["staged_bytes"], None),
            ("gradients in host memory", closed["grads_in_host_bytes"], compiled.get("grads_in_host_bytes")),
            *ways,
            ("parameters fetched for it", closed["fetched_bytes"], None),
            ("fetched at each use", closed["at_use_bytes"], compiled.get("fetched_bytes")),
            ("gradients that leave", closed["left_bytes"], compiled.get("left_bytes")),
        ]
        return ["Off the device", render(_table("", [row for row in rows if row[1]]))]

    def _traffic(self) -> list[str]:
        closed, compiled = _flat(self.closed), _flat(self.compiled)
        rows = [(name, closed.get(name), compiled.get(name)) for name in _keys(closed, compiled)]
        return ["Wire, per step", render(_table("axis and collective", rows))] if rows else ["Wire: nothing moves.\n"]

    def _speed(self) -> list[str]:
        if not self.time:
            return []
        time = self.time
        wires = "".join(f", wire over {axis} {_seconds(value)}" for axis, value in time["wire_s"].items())
        parts = f"compute {_seconds(time['compute_s'])}{wires}, update {_seconds(time['update_s'])}"
        rate = f"{time['tokens_per_s_per_device']:,.0f} tokens/s, MFU {time['mfu']:.1%}, bound by {time['bound']}"
        price = [f"  ${time['dollars_per_1e9_tokens']:,.0f} per 1e9 tokens"] if "dollars_per_1e9_tokens" in time else []
        head = f"Time (closed form, a good run): {_seconds(time['step_s'])} a step; {rate}"
        return [head, f"  {parts}", *_transfers(time.get("transfer")), *price, ""]

    def _verdict(self) -> list[str]:
        room = f"{human(self.peak_bytes)} of {human(self.usable_bytes)} that a program can have of {human(self.device_bytes)}"
        others = [f"{name}: {human(one['need'])} of {human(one['have'])}" for name, one in self.budgets.items()]
        if self.fits:
            return [f"Fits: {'; '.join([room, *others])}."]
        missing = " and ".join(f"{human(size)} of {_PLACES[name]}" for name, size in self.short.items())
        lines = [f"Does not fit: {missing} missing ({'; '.join([room, *others])})."]
        parts = (self.closed or {}).get("parts", {})
        if parts:
            largest = [f"  {name}: {human(size)}" for name, size in list(parts.items())[:5]]
            lines += ["Largest parts, by the closed form:", *largest]
        return [*lines, *self._ways_out()] if self.closed else lines

    def _ways_out(self) -> list[str]:
        if not self.changes:
            what = "stage, mesh, remat, accumulate or offload"
            return [f"No single or double change of {what} makes it fit: use more or larger devices."]
        return ["Would fit:", *(f"  {_change(one)}" for one in self.changes[:4])]

    def _lines(self) -> list[str]:
        findings = list((self.compiled or {}).get("findings", ()))
        said = [textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in [*self.notes, *findings]]
        return ["", *said] if said else []


def _change(one: Mapping[str, Any]) -> str:
    measured = one.get("compiled_peak_bytes")
    peak = f"{human(measured)}, compiled" if measured else f"{human(one['peak_bytes'])}, by the closed form"
    return f"{one['flags']}: {peak}, {_seconds(one['step_s'])} a step"


def _transfers(found: Mapping[str, Any] | None) -> list[str]:
    """What comes and goes, and how much of it nobody waits for."""
    if not found:
        return []
    names = {
        "fetch_s": "parameters", "read_s": "parameters from files", "uses_s": "parameters at their uses",
        "activations_s": "activations",
        "link_s": "update over the host link", "host_s": "update by the host", "disk_s": "disk",
    }  # fmt: skip
    parts = ", ".join(f"{name} {_seconds(found[key])}" for key, name in names.items() if found[key])
    waited = f"{found['hidden']:.0%} of the transfers' time is hidden, {_seconds(found['waited_s'])} is not"
    return [f"  off the device: {parts}; {waited}"]


_PLACES = {"device": "device memory", "host": "host memory", "disk": "disk"}
_TOTALS = (("temporaries", "temp"), ("peak", "peak"))


def _keys(*tables: Mapping[str, Any] | None) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table or ()))


def _flat(figures: Mapping[str, Any] | None) -> dict[str, int]:
    wire = (figures or {}).get("wire", {})
    return {f"{axis} {kind}": size for axis, kinds in wire.items() for kind, size in kinds.items()}


def _table(name: str, rows: Sequence[tuple[str, int | None, int | None]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(name, no_wrap=True)
    for heading in ("closed form", "compiled", "apart"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, closed, compiled in rows:
        apart = f"{closed / compiled - 1:+.1%}" if closed is not None and compiled else "-"
        table.add_row(label, human(closed), human(compiled), apart)
    return table


def rendered(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their names, numbers or not, as text."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*row)
    return render(table)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
