"""`rules=`: the user's own specs by path pattern or callable. First match wins; every mistake is found before anything runs."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh, PartitionSpec

from jzero._errors import columns, explain, suggest
from jzero._tree import short
from jzero._types import MESH_AXES, Leaf
from jzero.mesh import axis_size, describe

Rule = tuple[str, PartitionSpec] | Callable[[str, Leaf], PartitionSpec | None]
Entries = tuple[tuple[str, ...], ...]  # a spec as one tuple of axis names for each dim


class Override(NamedTuple):
    """What a rule said about one leaf."""

    entries: Entries  # padded to ndim; axes of size 1 that the mesh leaves out are dropped
    names_axes: bool  # False for PartitionSpec(): replicated on purpose
    rule: str  # as reports print it


class Asked(NamedTuple):
    """One rule, checked."""

    name: str
    pattern: re.Pattern[str] | None
    ask: Callable[[str, Leaf], PartitionSpec | None]


def overrides(leaves: Sequence[Leaf], rules: Iterable[Rule], mesh: Mesh) -> dict[int, Override]:
    """The first matching rule's word on each leaf that rules apply to: parameters and leaves that mirror none."""
    asked = [_parse(rule) for rule in rules]
    targets = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.owner in (None, i)]
    _check_matches(asked, targets, leaves)
    found: dict[int, tuple[str, PartitionSpec]] = {}
    for i, leaf in targets:
        answers = ((rule.name, spec) for rule in asked if (spec := rule.ask(leaf.path, leaf)) is not None)
        answer = next(answers, None)
        if answer is not None:
            found[i] = answer
    _check_specs([(leaves[i], name, spec) for i, (name, spec) in found.items()], mesh)
    return {i: _override(leaves[i], name, spec, mesh) for i, (name, spec) in found.items()}


def _parse(rule: Rule) -> Asked:
    if callable(rule):
        return Asked(getattr(rule, "__name__", repr(rule)), None, rule)
    if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
        raise TypeError(_bad_rule(rule, "a rule is a pair (pattern, PartitionSpec) or a callable(path, leaf)"))
    pattern, spec = rule
    if not isinstance(spec, PartitionSpec):
        raise TypeError(_bad_rule(rule, f"a rule's second part is a PartitionSpec, not {type(spec).__name__}"))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(_bad_rule(rule, f"the pattern is no regular expression: {error}")) from error
    return Asked(repr(pattern), compiled, lambda path, leaf: spec if compiled.search(path) else None)


def _bad_rule(rule: object, problem: str) -> str:
    fix = 'Write rules=[(r"attn/kernel", PartitionSpec(None, "tensor"))]; paths look like layers/attn/kernel.'
    return explain("jzero.shard", f"rules=: {problem}", found=[repr(rule)], fix=fix)


def _check_matches(asked: Sequence[Asked], targets: Sequence[tuple[int, Leaf]], leaves: Sequence[Leaf]) -> None:
    """A pattern that nothing matches is a slip: raise and show the paths."""
    paths = [leaf.path for _, leaf in targets]
    lost = [rule for rule in asked if rule.pattern and not any(map(rule.pattern.search, paths))]
    if not lost:
        return
    rows = [[rule.name, _why_lost(rule, leaves)] for rule in lost]
    shown = ", ".join(paths[:12]) + (f", ... ({len(paths)} in all)" if len(paths) > 12 else "")
    problem = f"rules=: {len(lost)} of {len(asked)} patterns match nothing"
    fix = "Correct the pattern, or remove the rule. Optimizer leaves follow the parameter that they mirror and need no rule."
    raise ValueError(explain("jzero.shard", problem, found=columns(rows), context=f"paths: {shown}", fix=fix))


def _why_lost(rule: Asked, leaves: Sequence[Leaf]) -> str:
    hit = next((leaf for leaf in leaves if rule.pattern and rule.pattern.search(leaf.path)), None)
    if hit is None or hit.owner is None:
        return "matches no leaf"
    return f"matches only leaves that follow a parameter ({hit.path} follows {leaves[hit.owner].path})"


def _check_specs(found: Sequence[tuple[Leaf, str, PartitionSpec]], mesh: Mesh) -> None:
    """Raise for all specs that their leaves or the mesh cannot take."""
    checked = [(leaf, name, spec, _wrong(leaf, spec, mesh)) for leaf, name, spec in found]
    rows = [[leaf.path, short(leaf), f"rule {name}: {spec}", wrong] for leaf, name, spec, wrong in checked if wrong]
    if rows:
        fix = "Give a spec with at most one entry for each dim: axes of the mesh, each once, whose sizes divide the dim."
        problem = f"rules=: {len(rows)} leaves cannot take the spec that a rule gives them"
        raise ValueError(explain("jzero.shard", problem, found=columns(rows), context=f"mesh {describe(mesh)}", fix=fix))


def _wrong(leaf: Leaf, spec: object, mesh: Mesh) -> str:
    """What is wrong with one spec for one leaf; empty if nothing is."""
    if not isinstance(spec, PartitionSpec):
        return f"a {type(spec).__name__} is no PartitionSpec"
    if len(spec) > len(leaf.shape):
        return f"{len(spec)} entries for {len(leaf.shape)} dims"
    entries = _entries(spec)
    axes = [axis for entry in entries for axis in entry]
    if not all(isinstance(axis, str) for axis in axes):
        return "entries are axis names, tuples of them, or None"
    known = dict.fromkeys([*mesh.axis_names, *MESH_AXES])
    unknown = [f"unknown axis {axis!r}. {suggest(axis, known)}" for axis in axes if axis not in known]
    twice = [f"axis {axis!r} appears {count} times" for axis, count in Counter(axes).items() if count > 1]
    sizes = [(dim, size, axis_size(mesh, entry)) for dim, (size, entry) in enumerate(zip(leaf.shape, entries, strict=False))]
    uneven = [
        f"dim {dim} has size {size}, not a multiple of {parts}{_legal(entries[dim], size)}"
        for dim, size, parts in sizes
        if size % parts
    ]
    return "; ".join(unknown or twice or uneven)


def _legal(entry: tuple[str, ...], size: int) -> str:
    """Experts are few, so the axis sizes that would do can be listed."""
    legal = ", ".join(str(parts) for parts in range(1, size + 1) if size % parts == 0)
    return f": legal sizes of axis 'expert' are {legal}" if entry == ("expert",) else ""


def _entries(spec: PartitionSpec) -> Entries:
    return tuple(() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec)


def _override(leaf: Leaf, name: str, spec: PartitionSpec, mesh: Mesh) -> Override:
    entries = _entries(spec) + ((),) * (len(leaf.shape) - len(spec))
    present = tuple(tuple(axis for axis in entry if axis in mesh.axis_names) for entry in entries)
    return Override(present, any(entries), f"rule {name}")


def to_spec(entries: Entries) -> PartitionSpec:
    """Entries as the shortest equal PartitionSpec: single names unwrapped, trailing Nones dropped."""
    last = max((dim + 1 for dim, entry in enumerate(entries) if entry), default=0)
    return PartitionSpec(*(None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries[:last]))
