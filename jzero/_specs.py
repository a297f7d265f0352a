"""Entries of a spec: which mesh axes split a dim, and which of them ZeRO put there."""

from collections.abc import Iterable
from typing import Any

from jzero._types import ZERO_BATCH_AXES


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry: None, a name, or a tuple of names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def axes(split: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes in all entries."""
    return tuple(name for entry in split for name in names(entry))


def zero_axes(entry: Any) -> tuple[str, ...]:
    """The axes over which ZeRO splits a dim: `data`, and `expert` beside it.

    `expert` on a dim of its own is no part of ZeRO: its pieces are different experts, and nobody gathers them.
    """
    here = names(entry)
    return tuple(name for name in here if name in ZERO_BATCH_AXES) if "data" in here else ()


def zero_split(split: Iterable[Any]) -> tuple[str, ...]:
    """The axes over which ZeRO splits a leaf; empty if it does not."""
    return next((found for entry in split if (found := zero_axes(entry))), ())


def without_zero(entry: Any) -> tuple[str, ...]:
    """An entry's axes when ZeRO's are gathered."""
    gone = zero_axes(entry)
    return tuple(name for name in names(entry) if name not in gone)


def entry_of(found: tuple[str, ...]) -> Any:
    """The shortest entry that says these axes."""
    return found[0] if len(found) == 1 else found or None
