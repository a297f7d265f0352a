"""One shape for every message a user reads: who spoke, what was expected, what was met, the context, a way out."""

import difflib
from collections.abc import Iterable, Sequence


class StageNotAchieved(RuntimeError):
    """A ZeRO stage was asked for and the compiled program does not have it; the message names the leaves."""


def explain(who: str, problem: str, *, found: Sequence[str] = (), context: str = "", fix: str = "") -> str:
    """The five parts as text. `found` is one line per failing leaf or value: all of them, not the first."""
    lines = [f"{who}: {problem}", *(f"  {line}" for line in found)]
    return "\n".join([*lines, *(part for part in (context, fix) if part)])


def columns(rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows as aligned text lines, for the `found` part of a message."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def suggest(name: object, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` when something known is close to `name`, and in any case what is known."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
