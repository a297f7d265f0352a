"""Small covers of large tables: every pair of values of every two factors meets in some entry.

Most faults need one or two factors to show (Kuhn, Wallace and Gallo: Software fault interactions, 2004), so a pairwise cover
runs by default and the full product in `make test-all`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Entry = dict[str, Any]


def product(factors: Mapping[str, Sequence[Any]]) -> list[Entry]:
    """Every combination."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def pairs_of(entry: Entry) -> set[tuple[Any, ...]]:
    return {(*left, *right) for left, right in itertools.combinations(entry.items(), 2)}


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Entry]:
    """Greedy cover, the same on every run: start an entry with the first open pair, fill in what covers most open pairs.

    Ties go to the value that was used least, so that every value appears about equally often.
    """
    order = sorted(factors, key=lambda name: -len(factors[name]))
    open_pairs = {
        (a, x, b, y): None for a, b in itertools.combinations(order, 2) for x in factors[a] for y in factors[b]
    }  # a dict keeps its order
    used = {(name, value): 0 for name in order for value in factors[name]}
    entries = []
    while open_pairs:
        first = next(iter(open_pairs))
        entry = {first[0]: first[1], first[2]: first[3]}
        for name in order:
            if name not in entry:
                entry[name] = min(
                    factors[name], key=lambda value: (-_gain(entry, name, value, order, open_pairs), used[name, value])
                )
        for item in entry.items():
            used[item] += 1
        entry = {name: entry[name] for name in order}
        for pair in pairs_of(entry):
            open_pairs.pop(pair, None)
        entries.append({name: entry[name] for name in factors})
    return entries


def _gain(entry: Entry, name: str, value: Any, order: Sequence[str], open_pairs: Mapping[Any, None]) -> int:
    """How many open pairs `value` would cover beside what the entry holds."""
    rank = {factor: index for index, factor in enumerate(order)}

    def pair(other: str) -> tuple[Any, ...]:
        ends = sorted(((name, value), (other, entry[other])), key=lambda end: rank[end[0]])
        return (*ends[0], *ends[1])

    return sum(pair(other) in open_pairs for other in entry)


def label(entry: Entry) -> str:
    """An entry as a test id."""
    return "-".join(f"{name}={value}" for name, value in entry.items())
