"""The bench's table: one column per contender, one row per figure, measured beside the formula."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jzero.report import human

_ROLES = ("params", "opt_state", "batch", "other")


def table(found: Mapping[str, Any]) -> RenderableType:
    """Everything that a bench prints when it is done."""
    runs = found["runs"]
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("", no_wrap=True)
    for run in runs:
        rows.add_column(label(run), justify="right", no_wrap=True)
    for name, cells in _rows(runs):
        rows.add_row(*map(Text, (name, *cells)))  # not markup: "[min..max]" would be a tag
    return Group(Text(_title(found)), rows, *map(Text, _notes(found)))


def label(run: Mapping[str, Any]) -> str:
    """`plain JAX` or `stage 3`."""
    return "plain JAX" if run["stage"] is None else f"stage {run['stage']}"


def _title(found: Mapping[str, Any]) -> str:
    run, shared = found["runs"][0], found["shared"]
    mesh = ",".join(f"{axis}={size}" for axis, size in run["mesh"].items())
    size = f"batch {shared['batch']} x {shared['seq']} tokens, accumulate {shared['accumulate']}"
    return (
        f"{run['model']} ({shared['num_params']:,} parameters), {run['precision']}, {size}, on {found['device']}, mesh {mesh}"
    )


def _rows(runs: list[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    speed = [
        ("loss, first to last", [f"{run['loss_first']:.4f} to {run['loss_last']:.4f}" for run in runs]),
        ("step, ms: median [min..max]", [_spread(run["step_time_ms"]) for run in runs]),
        ("tokens/s per device", [f"{run['tokens_per_s_per_device']:,.0f}" for run in runs]),
        ("MFU", [f"{run['mfu']:.1%}" for run in runs]),
    ]
    rest = [(f"at rest: {role}", [_figure(run["bytes_at_rest"].get(role)) for run in runs]) for role in _roles(runs)]
    wire = [
        (f"wire, {axis}: {kind}", [_figure(run["wire_bytes"].get(axis, {}).get(kind)) for run in runs])
        for axis, kind in _wires(runs)
    ]
    memory = [("temporaries", [human(run["temp_bytes"]) for run in runs]), ("peak", [human(run["peak_bytes"]) for run in runs])]
    return [*speed, *rest, *wire, *memory]


def _roles(runs: list[Mapping[str, Any]]) -> list[str]:
    return [role for role in _ROLES if any(_amount(run["bytes_at_rest"].get(role)) for run in runs)]


def _wires(runs: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every (axis, kind of collective) that some run has, in order of appearance."""
    pairs = [(axis, kind) for run in runs for axis, kinds in run["wire_bytes"].items() for kind in kinds]
    return list(dict.fromkeys(pairs))


def _spread(times: Mapping[str, float]) -> str:
    digits = 0 if times["median"] >= 100 else 1
    return f"{times['median']:.{digits}f} [{times['min']:.{digits}f}..{times['max']:.{digits}f}]"


def _amount(figure: Mapping[str, Any] | None) -> float:
    return max(figure["measured"] or 0, figure["formula"] or 0) if figure else 0


def _figure(figure: Mapping[str, Any] | None) -> str:
    """`12.3 MB (12.3 MB)`: measured, then the formula's."""
    if figure is None or not _amount(figure):
        return "-"
    return human(figure["measured"]) + ("" if figure["formula"] is None else f" ({human(figure['formula'])})")


def _notes(found: Mapping[str, Any]) -> list[str]:
    shared, runs = found["shared"], found["runs"]
    lines = [
        "Bytes are per device: measured on the compiled program (formula of the stage); on the wire per step, ring algorithm.",
        f"MFU: {runs[0]['flops_formula']}; peak {shared['peak_source']}.",
        f"Attention: {shared['attention']}. Data: {shared['data']}. First steps are not timed.",
        *_agreement(runs),
    ]
    if shared["simulated"]:
        lines.append(
            "Simulated devices share this machine's cores: compare times within this run only; sharding saves none here."
        )
        if runs[0]["precision"].startswith("bf16"):
            lines.append("XLA:CPU widens bf16 collectives to fp32: on the wire twice what the formula says.")
    return [*lines, *_findings(runs)]


def _findings(runs: list[Mapping[str, Any]]) -> list[str]:
    """Each finding once, with the runs that have it."""
    labels: dict[str, list[str]] = {}
    for run in runs:
        for finding in run["findings"]:
            labels.setdefault(finding, []).append(label(run))
    return [f"{', '.join(names)}: {finding}" for finding, names in labels.items()]


def _agreement(runs: list[Mapping[str, Any]]) -> list[str]:
    if len(runs) == 1:
        return []
    apart = [abs(a - b) for run in runs for a, b in zip(run["losses"], runs[0]["losses"], strict=True)]
    return [f"Losses differ from {label(runs[0])} by at most {max(apart):.1e} over {len(runs[0]['losses'])} steps."]
