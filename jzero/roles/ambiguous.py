"""The error for a state whose parameters cannot be told: the tree, the candidates and the line to write."""

from collections.abc import Sequence
from typing import Any

import jax

from jzero._errors import columns, explain
from jzero._tree import leaves_with_path, short
from jzero.roles.entries import Entry, Parts

MAX_TREE_LINES = 40


def ambiguous(problem: str, roots: Sequence[Parts], found: Sequence[Entry], state: Any) -> str:
    """`problem` with the candidate `roots`, the tree, and `params=` spelt for the first candidate."""
    ways = [access(root, found, state) for root in roots]
    rows = [
        [way, f"{sum(entry.parts[: len(root)] == root for entry in found)} leaves"]
        for way, root in zip(ways, roots, strict=True)
    ]
    fix = f"Say which one it is: jzero.shard(step, stage=3, params=lambda state: {ways[0] if ways else 'state[...]'})"
    problem = f"cannot tell which leaves are the parameters: {problem}"
    return explain("jzero.shard", problem, found=columns(rows), context=tree(found), fix=fix)


def access(root: Parts, found: Sequence[Entry], state: Any) -> str:
    """The subtree at `root` as an expression: `state['model']`, `state.params`, `state[0]`."""
    index = next(i for i, entry in enumerate(found) if entry.parts[: len(root)] == root)
    path, _ = leaves_with_path(state)[index]
    return "state" + jax.tree_util.keystr(path[: len(root)])


def tree(found: Sequence[Entry]) -> str:
    """The state as text, one leaf a line."""
    shown = found if len(found) <= MAX_TREE_LINES else found[: MAX_TREE_LINES - 1]
    lines = columns([["/".join(entry.parts) or "(the state itself)", short(entry)] for entry in shown])
    more = [] if len(shown) == len(found) else [f"... and {len(found) - len(shown)} more leaves"]
    return "\n".join(["The state:", *(f"  {line}" for line in [*lines, *more])])
