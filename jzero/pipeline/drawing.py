"""A schedule drawn: as text, and as a picture."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jzero.pipeline.schedule import Schedule

COLORS = {"F": "tab:blue", "B": "tab:green", "I": "mediumseagreen", "W": "tab:olive"}


def text(schedule: "Schedule") -> str:
    """A line of numbers, then one line per pipe stage."""
    cells = [[str(row[stage]) if row[stage] else "." for row in schedule.table] for stage in range(schedule.num_pipe_stages)]
    width = max((len(cell) for line in cells for cell in line), default=1)
    lines = [" ".join(cell.ljust(width) for cell in line).rstrip() for line in cells]
    return "\n".join([title(schedule), *(f"stage {stage}  {line}" for stage, line in enumerate(lines))])


def title(schedule: "Schedule") -> str:
    chunks = f", {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    sizes = f"{schedule.num_pipe_stages} pipe stages, {schedule.num_microbatches} microbatches{chunks}"
    live = " ".join(map(str, schedule.live))
    return f"{schedule.name}: {sizes}; {schedule.num_ticks} ticks, bubble {schedule.bubble_fraction:.3f}, live {live}"


def picture(schedule: "Schedule", path: str) -> None:
    """A box per operation, darker for later chunks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, schedule.num_ticks * 0.3), 1 + schedule.num_pipe_stages * 0.4), layout="constrained")
    axes = figure.subplots()
    for tick, row in enumerate(schedule.table):
        for stage, entry in enumerate(row):
            if entry is not None:
                alpha = 0.4 + 0.5 * (entry.chunk + 1) / schedule.num_chunks
                axes.barh(stage, 1, left=tick, color=COLORS[entry.op], edgecolor="white", alpha=min(alpha, 1.0))
                axes.text(tick + 0.5, stage, str(entry), ha="center", va="center", fontsize=6, color="white")
    axes.set(title=title(schedule), xlabel="tick", ylabel="pipe stage", yticks=range(schedule.num_pipe_stages))
    axes.set_xlim(0, schedule.num_ticks)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
