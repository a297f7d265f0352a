"""One shape for every message: who spoke, what was expected, what was met, the context, a way out."""

import difflib
from collections.abc import Iterable, Sequence


def explain(who: str, problem: str, *, found: Sequence[str] = (), context: str = "", fix: str = "") -> str:
    """The five parts as text. `found` is one line per value that is wrong: all of them, not the first."""
    lines = [f"{who}: {problem}", *(f"  {line}" for line in found)]
    return "\n".join([*lines, *(part for part in (context, fix) if part)])


def suggest(name: object, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` when something known is close to `name`, and in any case what is known."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


def short(array: object) -> str:
    """`float32[8,128]`."""
    return f"{getattr(array, 'dtype', '?')}[{','.join(map(str, getattr(array, 'shape', ())))}]"
