"""From which leaves on disk each leaf of a state comes, where the two do not have the same names: renamed, stacked or new.

A state whose layers are scanned has one leaf per weight with the layers on dim 0, `layers/w [L, ...]`; unrolled it has L of
them, `layers/0/w [...]`. `restack` reads either as the other. Optimizer states mirror the parameters' names, so both rules
hold there too.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jzero._errors import explain
from jzero.checkpoint.naming import WHO, Name


class Changes(NamedTuple):
    """What `restore` was asked to do beyond reading leaves of the same names."""

    rename: Mapping[str, str] = {}
    partial: bool = False
    restack: bool = False


NONE = Changes()


class Source(NamedTuple):
    """Where a leaf comes from: one leaf on disk, layer `index` of a stacked one, or one leaf for each layer."""

    names: tuple[Name, ...]
    index: int | None = None


class Stored(NamedTuple):
    """A leaf on disk under the name that the state has for it."""

    name: Name
    shape: tuple[int, ...]
    dtype: Any


def renamed(there: Mapping[Name, Any], rename: Mapping[str, str]) -> dict[Name, Stored]:
    """What is on disk, each `re.sub(pattern, replacement, name)` applied in order to names joined by slashes.

    Raises:
      ValueError: a pattern that changes no name; two leaves that get one name.
    """
    new = {name: "/".join(name) for name in there}
    for pattern, replacement in rename.items():
        after = {name: re.sub(pattern, replacement, text) for name, text in new.items()}
        if after == new:
            known = ", ".join(sorted(new.values())[:5])
            fix = "Patterns are searched in names joined by slashes, as in rename={r'\\bencoder/': 'backbone/'}."
            raise ValueError(
                explain(f"{WHO}: restore", f"rename= {pattern!r} changes no name", context=f"on disk: {known}, ...", fix=fix)
            )
        new = after
    found: dict[Name, Stored] = {}
    for name, text in new.items():
        key = tuple(text.split("/"))
        if key in found:
            met = [f"{'/'.join(found[key].name)} and {'/'.join(name)} both become {text}"]
            raise ValueError(
                explain(f"{WHO}: restore", "rename= gives two leaves one name", found=met, fix="Be more specific.")
            )
        found[key] = Stored(name, tuple(there[name].shape), there[name].dtype)
    return found


def sources(wanted: Mapping[Name, tuple[int, ...]], there: Mapping[Name, Stored], *, restack: bool) -> dict[Name, Source]:
    """name in the state -> its source; names that have none are left out. `wanted`: the shapes of the state's leaves."""
    found: dict[Name, Source] = {}
    for name, shape in wanted.items():
        source = Source((there[name].name,)) if name in there else None
        if source is None and restack:
            source = _sliced(name, shape, wanted, there) or _stacked(name, shape, there)
        if source is not None:
            found[name] = source
    return found


def _sliced(name: Name, shape: tuple[int, ...], wanted: Mapping[Name, Any], there: Mapping[Name, Stored]) -> Source | None:
    for at, part in enumerate(name):
        if not part.isdigit():
            continue
        stacked = there.get((*name[:at], *name[at + 1 :]))
        if stacked is None or stacked.shape[1:] != shape or not stacked.shape:
            continue
        num_layers = stacked.shape[0]
        siblings = sum((*name[:at], str(index), *name[at + 1 :]) in wanted for index in range(num_layers + 1))
        if siblings == num_layers and int(part) < num_layers:
            return Source((stacked.name,), int(part))
    return None


def _stacked(name: Name, shape: tuple[int, ...], there: Mapping[Name, Stored]) -> Source | None:
    for at in range(1, len(name) + 1 if shape else 0):
        layers = [there.get((*name[:at], str(index), *name[at:])) for index in range(shape[0] + 1)]
        *first, beyond = layers
        if beyond is None and all(layer is not None and layer.shape == shape[1:] for layer in first):
            return Source(tuple(layer.name for layer in first if layer is not None))
    return None
