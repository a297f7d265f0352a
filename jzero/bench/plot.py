"""The bench as a picture: losses, step times, bytes at rest and on the wire."""

from collections.abc import Mapping
from typing import Any

from jzero._errors import explain
from jzero.bench.table import label


def check() -> None:
    """Raise before training, not after it, if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fix = "pip install 'jzero[plot]', or leave out --plot."
        raise ValueError(explain("jzero.bench", "--plot needs matplotlib", found=["it is not installed"], fix=fix)) from None


def plot(found: Mapping[str, Any], path: str) -> None:
    """Write the picture to `path`; the ending chooses the format."""
    from matplotlib.figure import Figure

    runs, figure = found["runs"], Figure(figsize=(11, 7), layout="constrained")
    losses, times, rest, wire = figure.subplots(2, 2).flat
    for index, run in enumerate(runs):
        losses.plot(run["losses"], label=label(run), linestyle=["-", "--", "-.", ":"][index % 4], linewidth=3 - 0.4 * index)
    losses.set(title="loss", xlabel="step")
    losses.legend()
    _times(times, runs)
    _bars(rest, runs, "bytes_at_rest", "MB at rest per device (dash: formula)")
    _bars(wire, runs, "wire_bytes", "MB on the wire per device and step (dash: formula)")
    figure.suptitle(f"{runs[0]['model']}, {runs[0]['precision']}, {found['device']}")
    figure.savefig(path, dpi=120)


def _times(axes: Any, runs: list[Mapping[str, Any]]) -> None:
    medians = [run["step_time_ms"]["median"] for run in runs]
    below = [median - run["step_time_ms"]["min"] for median, run in zip(medians, runs, strict=True)]
    above = [run["step_time_ms"]["max"] - median for median, run in zip(medians, runs, strict=True)]
    axes.bar([label(run) for run in runs], medians, yerr=[below, above], capsize=4, color="tab:gray")
    axes.set(title="step time, ms: median, least and most")


def _bars(axes: Any, runs: list[Mapping[str, Any]], key: str, title: str) -> None:
    """Bars stacked by role or collective, a dash where the formula puts their sum."""
    figures = [_flat(run[key]) for run in runs]
    bottom = [0.0] * len(runs)
    for name in dict.fromkeys(name for one in figures for name in one):
        heights = [(one.get(name, {}).get("measured") or 0) / 1e6 for one in figures]
        axes.bar([label(run) for run in runs], heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, one in enumerate(figures):
        formulas = [figure["formula"] for figure in one.values()]
        if formulas and None not in formulas:
            axes.hlines(sum(formulas) / 1e6, index - 0.45, index + 0.45, color="black", linestyle="--")
    axes.set(title=title)
    if any(figures):
        axes.legend(fontsize="small")


def _flat(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """`{role: figure}` as it is, `{axis: {kind: figure}}` as `{"axis: kind": figure}`; empty ones left out."""
    nested = {name: value if "measured" not in value else {"": value} for name, value in figures.items()}
    pairs = {f"{name}: {kind}" if kind else name: one for name, kinds in nested.items() for kind, one in kinds.items()}
    return {name: one for name, one in pairs.items() if one["measured"] or one["formula"]}
