"""A report as a picture: memory over the step by role, traffic by mesh axis. Needs matplotlib (the extra `plot`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jzero.report import Report

COLORS = {
    "params": "tab:blue", "opt_state": "tab:cyan", "batch": "tab:olive", "other": "tab:gray", "gathered parameters": "tab:red",
    "forward": "tab:green", "recomputed": "yellowgreen", "backward": "tab:orange", "gradients and update": "tab:purple",
}  # fmt: skip


def draw(report: "Report", path: str) -> None:
    """Write the picture to `path`; the ending chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    memory, wire = figure.subplots(2, 1, height_ratios=[2, 1])
    _memory(memory, report)
    _wire(wire, report)
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    figure.suptitle(f"stage {report.stage}, {report.engine} engine, mesh {mesh}, one device")
    figure.savefig(path, dpi=120)


def _memory(axes: Any, report: "Report") -> None:
    """What rests at the bottom, temporaries above it, each in the colour of its role."""
    lines = {role: [amount / 1e6 for amount in amounts] for role, amounts in report.memory_timeline.items()}
    moments = range(max(map(len, lines.values()), default=0))
    if lines:
        axes.stackplot(moments, *lines.values(), labels=list(lines), colors=[COLORS[role] for role in lines], step="post")
        axes.legend(fontsize="small", loc="upper left", ncols=3)
    axes.axhline(report.peak_bytes / 1e6, color="black", linestyle="--", linewidth=1)
    axes.set(title="memory over one step, MB (dash: the compiler's peak)", xlabel="instructions in order, loops entered once")
    axes.margins(x=0)


def _wire(axes: Any, report: "Report") -> None:
    """A bar for each collective of each axis, a mark where the formula puts it."""
    rows = [(f"{axis}: {kind}", one) for axis, kinds in report.wire_bytes.items() for kind, one in kinds.items()]
    names = [name for name, _ in rows]
    axes.barh(names, [(one["measured"] or 0) / 1e6 for _, one in rows], color="tab:blue")
    for index, (_, one) in enumerate(rows):
        if one["formula"] is not None:
            axes.vlines(one["formula"] / 1e6, index - 0.4, index + 0.4, color="black", linestyle="--")
    axes.invert_yaxis()
    axes.set(title="on the wire, MB per step (dash: formula)")
