"""The ZeRO rule: of each leaf, shard over `data` (and `expert` with it) the largest dim that divides."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from jzero._errors import columns, explain, suggest
from jzero._specs import without_zero
from jzero._tree import num_elements, short
from jzero._types import ALSO_AXES, ZERO_AXES, ZERO_BATCH_AXES, Leaf, Placement, Role
from jzero.mesh import axis_size, describe
from jzero.rules.overrides import Entries, Override, Rule, overrides, to_spec
from jzero.rules.stacked import stacked_dims

AXIS = "data"  # the first of the axes that ZeRO shards over; `replica` repeats
PIPE = "pipe"


class Choice(NamedTuple):
    """Where a leaf would live if its role is sharded."""

    entries: Entries
    why: str
    indivisible: tuple[int, ...] = ()  # the dims that could be sharded if `data` divided one of them


def place(
    leaves: Sequence[Leaf],
    *,
    mesh: Mesh,
    shard_roles: frozenset[Role],
    rules: Iterable[Rule] = (),
    min_shard_elements: int = 1024,
    on_indivisible: Literal["replicate", "error"] = "replicate",
    stacked: Sequence[int | None] | None = None,
    pipe_dims: Sequence[int | None] | None = None,
) -> tuple[Placement, ...]:
    """Where every leaf lives: W[..., F_data, ...] for the largest dim F that `data` divides, or whole, and the reason.

    A leaf that mirrors a parameter (a moment, an EMA) gets exactly the parameter's spec. Leaves whose role is not in
    `shard_roles` keep the axes that a rule gives them, without `data`. Never the dim that runs over stacked layers; dim 0 of
    other leaves of three or more dims only if no other dim divides. Ties go to the last dim. Moves no data.

    Args:
      leaves: from `roles.assign`.
      mesh: has a `data` axis; with size 1 nothing is sharded.
      shard_roles: the roles that the stage shards; a leaf of role `other` with an owner goes by its owner's role.
      rules: ordered `(regex, PartitionSpec)` or `callable(path, leaf) -> PartitionSpec | None`; first match wins. A spec that
        names `data` is final, `PartitionSpec()` means replicated on purpose, and one that names only other axes is completed
        with `data` on the largest dim that it leaves free.
      min_shard_elements: smaller leaves stay whole.
      on_indivisible: what to do with leaves of which no dim divides.
      stacked: the layer dim of each leaf where the caller knows it (from a scan); default `stacked_dims(leaves)`.
      pipe_dims: per leaf the dim that is split over `pipe`, which stays so whatever a rule says of the others.

    Raises:
      ValueError: bad rules, or indivisible leaves under `on_indivisible="error"`; the message lists every one.

    Example:
      >>> import numpy as np
      >>> from jzero.mesh import make_mesh
      >>> leaf = Leaf("w", (512, 2048), np.dtype("float32"), "params", 0)
      >>> place([leaf], mesh=make_mesh(data=8), shard_roles=frozenset({"params"}))[0].spec
      P(None, 'data')
    """
    _check_option(on_indivisible)
    asked = overrides(leaves, rules, mesh)
    layer_dims = stacked_dims(leaves) if stacked is None else stacked
    over_pipe = (None,) * len(leaves) if pipe_dims is None else pipe_dims
    choices = [
        _choose(leaf, asked.get(i), mesh, layer_dims[i], over_pipe[i], min_shard_elements) if leaf.owner in (None, i) else None
        for i, leaf in enumerate(leaves)
    ]
    placed = [_placed(i, leaves, choices, asked, shard_roles) for i in range(len(leaves))]
    if on_indivisible == "error" and any(choice.indivisible for choice in placed):
        raise ValueError(_indivisible(placed, leaves, mesh, min_shard_elements))
    return tuple(Placement(leaf, to_spec(choice.entries), choice.why) for leaf, choice in zip(leaves, placed, strict=True))


def _check_option(on_indivisible: str) -> None:
    known = ("replicate", "error")
    if on_indivisible not in known:
        problem = "on_indivisible= is 'replicate' or 'error'"
        found = [f"on_indivisible={on_indivisible!r}"]
        raise ValueError(explain("jzero.shard", problem, found=found, fix=suggest(on_indivisible, known)))


def _choose(
    leaf: Leaf, asked: Override | None, mesh: Mesh, layer_dim: int | None, pipe_dim: int | None, min_shard_elements: int
) -> Choice:
    """The leaf's spec if its role is sharded: what a rule says, completed with `data`."""
    entries = _over_pipe(asked.entries if asked else ((),) * len(leaf.shape), pipe_dim)
    if asked and (not asked.names_axes or any(AXIS in entry for entry in entries)):
        return Choice(entries, asked.rule)
    said = f"{asked.rule}; " if asked else ""
    axes = zero_axes(entries, mesh)
    if axis_size(mesh, (*axes, *ALSO_AXES)) == 1:
        return Choice(entries, f"{said}axis '{AXIS}' has size 1")
    if num_elements(leaf) < min_shard_elements:
        return Choice(entries, f"{said}{num_elements(leaf)} elements, under min_shard_elements={min_shard_elements}")
    if axis_size(mesh, axes) == 1:
        return _also(Choice(entries, f"{said}axis '{AXIS}' has size 1"), leaf, mesh, layer_dim)
    for over in dict.fromkeys((axes, (AXIS,))):  # a dim that data alone divides is better than none
        num_shards = axis_size(mesh, over)
        dim = _largest(leaf.shape, entries, num_shards, layer_dim) if num_shards > 1 else None
        if dim is not None:
            sharded = (*entries[:dim], over, *entries[dim + 1 :])
            why = f"{said}dim {dim} of size {leaf.shape[dim]} over '{'+'.join(over)}' ({num_shards})"
            why += f": no free dim is a multiple of {axis_size(mesh, axes)}" if over != axes else ""
            return _also(Choice(sharded, why), leaf, mesh, layer_dim)
    left = _left(leaf.shape, entries, layer_dim)
    return Choice(entries, f"{said}{_why_none(leaf, left, axis_size(mesh, axes))}", tuple(left))


def zero_axes(entries: Entries, mesh: Mesh) -> tuple[str, ...]:
    """The batch axes over which ZeRO shards a leaf with these entries: `data`, and `expert` unless its pieces are experts."""
    taken = {axis for entry in entries for axis in entry}
    return tuple(axis for axis in ZERO_BATCH_AXES if axis == AXIS or (axis in mesh.axis_names and axis not in taken))


def _also(choice: Choice, leaf: Leaf, mesh: Mesh, layer_dim: int | None) -> Choice:
    """Over the other axes that would repeat the leaf: the largest dim that is left, or else what `data` leaves of its own."""
    for axis in ALSO_AXES:
        num, entries = axis_size(mesh, axis), choice.entries
        if num == 1 or any(axis in entry for entry in entries):
            continue
        dim = _largest(leaf.shape, entries, num, layer_dim)
        if dim is None:
            shares = (dim for dim, entry in enumerate(entries) if entry[:1] == (AXIS,) and set(entry) <= set(ZERO_AXES))
            dim = next((dim for dim in shares if leaf.shape[dim] % (axis_size(mesh, entries[dim]) * num) == 0), None)
        if dim is None:
            choice = choice._replace(why=f"{choice.why}; '{axis}' ({num}) divides none of what is left")
            continue
        entries = (*entries[:dim], (*entries[dim], axis), *entries[dim + 1 :])
        choice = choice._replace(
            entries=entries, why=f"{choice.why}, dim {dim} of size {leaf.shape[dim]} over '{axis}' ({num})"
        )
    return choice


def _over_pipe(entries: Entries, dim: int | None) -> Entries:
    if dim is None or any(PIPE in entry for entry in entries):
        return entries
    return (*entries[:dim], (PIPE, *entries[dim]), *entries[dim + 1 :])


def _why_none(leaf: Leaf, left: Sequence[int], num_shards: int) -> str:
    dims = f"no dim of {short(leaf)}" if len(left) == len(leaf.shape) else f"of {short(leaf)} only dims {left} are free: none"
    return f"{dims} is a multiple of {num_shards}" if left else f"no dim of {short(leaf)} is free"


def _largest(shape: tuple[int, ...], entries: Entries, num_shards: int, layer_dim: int | None) -> int | None:
    """The dim to shard, or None."""
    fits = [dim for dim in _left(shape, entries, layer_dim) if shape[dim] % num_shards == 0]
    late = [dim for dim in fits if dim > 0 or len(shape) < 3] or fits
    return max(late, key=lambda dim: (shape[dim], dim), default=None)


def _left(shape: tuple[int, ...], entries: Entries, layer_dim: int | None) -> list[int]:
    """The dims that may be sharded: not the layer dim, none that a rule shards, none that is empty."""
    return [dim for dim, size in enumerate(shape) if not entries[dim] and dim != layer_dim and size > 0]


def _source(i: int, leaf: Leaf) -> int:
    """The leaf whose placement leaf `i` takes: the parameter that it mirrors, or itself."""
    return i if leaf.owner is None else leaf.owner


def _placed(
    i: int, leaves: Sequence[Leaf], choices: Sequence[Choice | None], asked: dict[int, Override], shard_roles: frozenset[Role]
) -> Choice:
    """The final word on leaf `i`: its own or its owner's choice, without ZeRO's axes where its role is not sharded."""
    leaf = leaves[i]
    source = _source(i, leaf)
    choice = choices[source]
    assert choice is not None, f"leaf {source} owns another leaf and must own itself"
    role = leaves[source].role if leaf.role == "other" else leaf.role
    follows = "" if source == i else f"follows {leaves[source].path}: "
    on_request = role == "other" and i in asked and bool(shard_roles)
    if role in shard_roles or on_request:
        return choice._replace(why=f"{follows}{choice.why}")
    without = tuple(tuple(axis for axis in without_zero(entry) if axis not in ALSO_AXES) for entry in choice.entries)
    said = f"{asked[source].rule}; " if source in asked and any(without) else ""
    return Choice(without, f"{said}{role} is not sharded over '{AXIS}' here")


def _indivisible(placed: Sequence[Choice], leaves: Sequence[Leaf], mesh: Mesh, least: int) -> str:
    """Every leaf that cannot be split, and the sizes that could."""
    axis = AXIS if axis_size(mesh, AXIS) > 1 else "+".join(axis for axis in ZERO_BATCH_AXES if axis in mesh.axis_names)
    num_shards = axis_size(mesh, axis.split("+"))  # the least that a dim must be a multiple of
    rows: list[list[str]] = []
    pads: dict[int, str] = {}  # one for each parameter, whose mirrors have the same shape
    for i, (leaf, choice) in enumerate(zip(leaves, placed, strict=True)):
        if choice.indivisible:
            sizes = ", ".join(f"dim {dim} has size {leaf.shape[dim]}" for dim in choice.indivisible)
            wrong = "same" if _source(i, leaf) in pads else f"{sizes}: no multiple of {num_shards}"
            rows.append([leaf.path, short(leaf), wrong])
            size, dim = max((leaf.shape[dim], dim) for dim in choice.indivisible)
            pads.setdefault(_source(i, leaf), f"dim {dim} of {leaf.path} to {-(-size // num_shards) * num_shards}")
    problem = f"{len(rows)} of {len(leaves)} leaves cannot be split over axis '{axis}' (size {num_shards})"
    context = f"mesh {describe(mesh)}; rule largest_dim(min_shard_elements={least})"
    fix = f"Pad {', '.join(pads.values())}; give another spec in rules=, or allow replication with on_indivisible='replicate'"
    return explain("jzero.shard", problem, found=columns(rows), context=context, fix=fix)
