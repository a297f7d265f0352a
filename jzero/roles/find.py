"""Finds the roots of the parameters in a state. Certain signs first, names where they decide, an error where nothing does."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jzero.roles import names
from jzero.roles.ambiguous import ambiguous
from jzero.roles.entries import Entry, Parts
from jzero.roles.mirror import covers, widest

Groups = dict[Parts, list[Entry]]


class Found(NamedTuple):
    """The leaves, their kinds now settled as far as types and names go, and the roots that the parameters are below."""

    entries: list[Entry]
    roots: list[Parts]


def find(found: Sequence[Entry], state: Any) -> Found:
    """Roots of the parameter subtrees of `state`, whose leaves are `found`."""
    found = _settle_named(found)
    roots = _named_pairs(found)
    if not roots:
        found = _settle_hand_written(found)
        roots = _mirrored(found, state) or _typed(found) or _remaining(found, state)
    return Found(found, roots)


def _is_below(root: Parts, parts: Parts) -> bool:
    return parts[: len(root)] == root


def _weights(found: Sequence[Entry]) -> list[tuple[int, Entry]]:
    """Weight-like leaves outside optimizer state that nnx's types do not rule out."""
    kinds = ("param",) if any(entry.kind == "param" for entry in found) else ("unknown",)
    return [(i, entry) for i, entry in enumerate(found) if entry.is_weight_like and entry.kind in kinds]


# By name ----------------------------------------------------------------------------------------------------------------------


def _settle_named(found: Sequence[Entry]) -> list[Entry]:
    """Everything below a key `opt_state`, or below an optimizer's name beside a key `params`, is optimizer state."""
    parents = {entry.parts[:i] for entry in found for i, part in enumerate(entry.parts) if part == "params"}

    def group(parts: Parts) -> Parts | None:
        for i, part in enumerate(parts):
            if part == "opt_state" or (part in names.OPT_CONTAINERS and parts[:i] in parents):
                return parts[: i + 1]
        return None

    return [_as_opt(entry, group(entry.parts)) for entry in found]


def _as_opt(entry: Entry, group: Parts | None) -> Entry:
    return entry if group is None or entry.kind != "unknown" else entry._replace(kind="opt", group=group)


def _named_pairs(found: Sequence[Entry]) -> list[Parts]:
    """Roots `X/params` where `X/opt_state` or the like is optimizer state."""
    steps = [(entry.parts[:i], part) for entry in found if entry.kind == "opt" for i, part in enumerate(entry.parts)]
    roots = {(*parent, "params") for parent, part in steps if part in names.OPT_CONTAINERS}
    rest = [entry.parts for entry in found if entry.kind != "opt"]
    return sorted(root for root in roots if any(_is_below(root, parts) for parts in rest))


# By mirroring -----------------------------------------------------------------------------------------------------------------


def _mirrored(found: Sequence[Entry], state: Any) -> list[Parts]:
    """The roots that optimizer states mirror: one choice for each optimizer state, names deciding between equals."""
    rest = _weights(found)
    groups: Groups = defaultdict(list)
    for entry in found:
        if entry.kind == "opt" and entry.group is not None and entry.is_moment_like:
            groups[entry.group].append(entry)
    for look in (covers, _covers_by_path, _covers_by_shape):
        choices = [widest(cover, groups) for group in groups.values() if (cover := look(group, rest))]
        if choices:
            return sorted({_only(names.prefer(roots), found, state) for roots in choices})
    return []


def _covers_by_path(group: Sequence[Entry], rest: Sequence[tuple[int, Entry]]) -> dict[Parts, set[int]]:
    """Every leaf factored, as Adafactor may: paths still agree."""
    return covers(group, rest, same_shape=False)


def _covers_by_shape(group: Sequence[Entry], rest: Sequence[tuple[int, Entry]]) -> dict[Parts, set[int]]:
    """Parameters that are one bare array: there is no path to agree on."""
    shapes = {mirror.shape for mirror in group}
    return {entry.parts: {i} for i, entry in rest if entry.shape in shapes}


def _only(roots: Sequence[Parts], found: Sequence[Entry], state: Any) -> Parts:
    if len(roots) != 1:
        raise ValueError(ambiguous("optimizer leaves mirror several subtrees equally", roots, found, state))
    return roots[0]


def _settle_hand_written(found: list[Entry]) -> list[Entry]:
    """Without a known optimizer: subtrees named like moments (`m`, `nu`, `velocity`) that mirror another subtree."""
    if any(entry.kind == "opt" for entry in found):
        return found
    groups: Groups = defaultdict(list)
    for entry in found:
        cut = next((i for i, part in enumerate(entry.parts) if names.is_opt(part)), None)
        if cut is not None:
            groups[entry.parts[: cut + 1]].append(entry)
    rest = [(i, entry) for i, entry in _weights(found) if not any(map(names.is_opt, entry.parts))]
    sure = [group for group, members in groups.items() if _mirrors_one_root(group, members, rest)]
    return [_as_opt(entry, next((group for group in sure if _is_below(group, entry.parts)), None)) for entry in found]


def _mirrors_one_root(group: Parts, members: Sequence[Entry], rest: Sequence[tuple[int, Entry]]) -> bool:
    """Whether all members mirror leaves below one root. `v` may be an attention's value: then the root's name decides."""
    likes = [entry for entry in members if entry.is_weight_like]
    roots = names.prefer(widest(covers(likes, rest) or _covers_by_shape(likes, rest), [group]))
    if len(roots) != 1 or not (len(group[-1]) > 2 or roots[0] == ("0",) or names.is_params(roots[0][-1:])):
        return False
    below = [(i, entry) for i, entry in rest if _is_below(roots[0], entry.parts)]
    return all(covers([like], below) or _covers_by_shape([like], below) for like in likes)


# By what is left --------------------------------------------------------------------------------------------------------------


def _typed(found: Sequence[Entry]) -> list[Parts]:
    """nnx: every Param is a parameter, copies of the model left aside."""
    if all(entry.kind != "param" for entry in found):
        return []
    children = _children(found)
    return names.prefer(list(children)) if len(children) == 1 or _twins(children) else [()]


def _remaining(found: Sequence[Entry], state: Any) -> list[Parts]:
    """An optimizer without memory, or none: the one subtree with weights, the one with the right name, or the whole state."""
    children = _children(found)
    named = [root for root, below in children.items() if names.is_params(root) and len(below[0].parts) > 1]
    if len(children) == 1 or len(named) == 1:
        root = named[0] if named else next(iter(children))
        inner = (*root, "params")
        return [inner if any(_is_below(inner, entry.parts[:-1]) for entry in children[root]) else root]
    twins = _twins(children)
    originals = names.prefer(twins)
    if twins and len(originals) == 1:
        return originals
    is_tuple = type(state) is tuple
    if children and (is_tuple or (twins and not _are_numbered(twins))):
        problem = "several subtrees look alike" if twins else "a tuple of several subtrees with weights"
        raise ValueError(ambiguous(f"{problem}, and nothing says which one is trained", list(children), found, state))
    return [()] if children else []


def _children(found: Sequence[Entry]) -> Groups:
    """The state's own children that hold weights, statistics left aside."""
    children: Groups = defaultdict(list)
    for _, entry in _weights(found):
        if not (entry.parts and entry.parts[0].lower() in names.NOT_PARAMS):
            children[entry.parts[:1]].append(entry)
    return children


def _twins(children: Groups) -> list[Parts]:
    """The children, if all of them are subtrees with the same paths and shapes."""
    signatures = {tuple((entry.parts[1:], entry.shape) for entry in below) for below in children.values()}
    alike = len(children) > 1 and len(signatures) == 1
    return list(children) if alike and all(parts for parts, _ in next(iter(signatures))) else []


def _are_numbered(roots: Sequence[Parts]) -> bool:
    """`0`, `1` or `layer_0`, `layer_1`: the layers of one model and not a model beside its moments."""
    stems = {re.sub(r"\d+$", "", root[-1]) for root in roots}
    return len(stems) == 1 and all(root[-1][-1:].isdigit() for root in roots)
