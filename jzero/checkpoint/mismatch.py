"""Leaves of a checkpoint that are not those of the step: which, and the change to write."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jzero._errors import columns, explain
from jzero._tree import is_key, short
from jzero.checkpoint import changes as changing
from jzero.checkpoint import folder, naming
from jzero.checkpoint.changes import Changes, Source, Stored
from jzero.checkpoint.naming import WHO, Name

_SHOWN = 20  # lines of a mismatch; more say less


def check(
    wanted: Mapping[Name, Any], there: Mapping[Name, Stored], sources: Mapping[Name, Source], found: folder.Found,
    *, changes: Changes, cast: bool, whole: bool,
) -> None:  # fmt: skip
    """Raise unless every leaf has a source of its shape and dtype, and, of a `whole` state, every leaf on disk is used.

    Args:
      wanted: the state's abstract leaves by name.
    """
    keys = {tuple(leaf["name"]): leaf["key"] for leaf in found.notes.get("leaves", ())}
    missing = [[_slashed(name), short(aval), "missing on disk"] for name, aval in wanted.items() if name not in sources]
    used = {name for source in sources.values() for name in source.names}
    extra = [[_slashed(name), _short(leaf), "not in the state"] for name, leaf in there.items() if leaf.name not in used]
    apart = [
        [_slashed(name), _short(there[name]), f"the step expects {short(aval)}"]
        for name, aval in wanted.items()
        if name in there and _differs(there[name], aval, keys.get(there[name].name), cast=cast)
    ]
    apart += [
        [_slashed(name), np.dtype(_dtype(sources[name], there)).name, f"the step expects {short(aval)}"]
        for name, aval in wanted.items()
        if name in sources and name not in there and _other_dtype(_dtype(sources[name], there), aval, cast=cast)
    ]
    if changes.partial:
        missing, extra = [], []
    rows = [*missing, *(extra if whole else []), *apart]
    if not rows:
        return
    problem = (
        f"{len(rows)} leaves do not match: {len(missing)} missing, {len(extra) if whole else 0} extra, {len(apart)} differ"
    )
    more = [f"... {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    fix = _way_out(missing, extra, apart, wanted, there)
    lines = [*columns(rows[:_SHOWN]), *more]
    raise ValueError(explain(f"{WHO}: restore", problem, found=lines, context=f"checkpoint {found.root}", fix=fix))


def _dtype(source: Source, there: Mapping[Name, Stored]) -> Any:
    return next(leaf.dtype for leaf in there.values() if leaf.name == source.names[0])


def _differs(there: Stored, aval: Any, key: str | None, *, cast: bool) -> bool:
    other_key = is_key(aval) and key is not None and key != naming.key_impl(aval)
    return there.shape != naming.stored_shape(aval).shape or other_key or _other_dtype(there.dtype, aval, cast=cast)


def _other_dtype(dtype: Any, aval: Any, *, cast: bool) -> bool:
    stored = naming.stored_shape(aval).dtype
    both_float = all(jnp.issubdtype(np.dtype(one), jnp.floating) for one in (dtype, stored))
    return np.dtype(dtype) != stored and not (cast and both_float)


def _way_out(
    missing: list[Any], extra: list[Any], apart: list[Any], wanted: Mapping[Name, Any], there: Mapping[Name, Stored]
) -> str:
    shapes = {name: naming.stored_shape(aval).shape for name, aval in wanted.items()}
    if apart and not missing and not extra and all(there[name].shape == shapes[name] for name in shapes if name in there):
        return "Pass cast=True to convert floating-point leaves to the step's precision."
    if missing and len(changing.sources(shapes, there, restack=True)) > len(shapes) - len(missing):
        return "Layers are stacked in one of the two and unrolled in the other: pass restack=True."
    fix = "Restore with the model and optimizer that wrote it; weights_only=True leaves the optimizer's leaves out."
    pairs = [(ours[0], theirs[0]) for ours in missing for theirs in extra if ours[1] == theirs[1]]
    if pairs:
        ours, theirs = max(pairs, key=lambda pair: _num_shared(*pair))
        fix += f"\nIf {theirs} is {ours} under an old name, pass rename={_rename(theirs, ours)}."
    if missing or apart:
        fix += "\nLeaves that are new: pass partial=True, into=step.init(make_state) to keep their first values."
    if any(name in there and there[name].shape != shapes[name] for name in shapes):
        fix += "\nA new one of an old name and another shape: rename the old one away first, rename={r'\\bhead/': 'old_head/'}."
    return fix


def _num_shared(one: str, other: str) -> int:
    return sum(a == b for a, b in zip(one.split("/"), other.split("/"), strict=False))


def _rename(theirs: str, ours: str) -> str:
    """The pattern that turns one name into the other, of the parts in which they differ."""
    left, right = theirs.split("/"), ours.split("/")
    while left and right and left[0] == right[0]:
        left, right = left[1:], right[1:]
    at_end = True
    while left and right and left[-1] == right[-1]:
        left, right, at_end = left[:-1], right[:-1], False
    if not left or not right:
        left, right, at_end = theirs.split("/"), ours.split("/"), True
    end = ("$", "") if at_end else ("/", "/")
    return f"{{r'\\b{re.escape('/'.join(left))}{end[0]}': '{'/'.join(right)}{end[1]}'}}"


def _slashed(name: Name) -> str:
    return "/".join(name)


def _short(leaf: Stored | jax.ShapeDtypeStruct) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
