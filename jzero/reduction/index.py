"""Rules of gathers, scatters and dynamic slices: an example may look into shared tables and into itself, not into others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jzero.reduction.equation import Equation, Rule
from jzero.reduction.moves import whole
from jzero.reduction.pointwise import only_per_example
from jzero.reduction.states import (
    BACKFLOW,
    INDEPENDENT,
    LAYOUT,
    POSITION,
    AnyState,
    Independent,
    Mixing,
    OwnIndex,
    PerExample,
    Shapes,
    Sum,
    is_zero,
    settle,
    snap,
    total,
)

OTHERS = "examples look up, or write into, other examples"


def _index_dims(rank: int, window_dims: Sequence[int]) -> list[int]:
    """The dims of a gather's result (or a scatter's updates) that belong to the indices, in the indices' order."""
    return [d for d in range(rank) if d not in window_dims]


def _windows(rank: int, dropped: Sequence[int], window_dims: Sequence[int]) -> dict[int, int]:
    """Operand dim -> the dim of the result (or updates) that its window runs along."""
    return dict(zip((d for d in range(rank) if d not in dropped), map(int, window_dims), strict=True))


def _indices(state: AnyState, shapes: Shapes) -> Independent | PerExample | OwnIndex:
    """The indices' claim; own indices with their columns spelled out."""
    last = len(shapes.small) - 1
    if isinstance(state, OwnIndex) and state.columns is None:
        state = OwnIndex(state.dim, tuple(range(shapes.small[last])))
    elif not isinstance(state, OwnIndex):
        state = only_per_example([settle(state, shapes)])
    if not isinstance(state, Independent) and state.dim == last:
        raise Mixing(OTHERS)
    return state


def _own_row(
    eq: Equation, indices: PerExample | OwnIndex, dim: int, batching: Mapping[int, int], index_map: Sequence[int]
) -> bool:
    """Whether row i of the indices looks into row i of the operand's `dim`: a batching dim, or a column of own indices."""
    if isinstance(indices, PerExample):
        return batching.get(dim) == indices.dim
    operand, table = eq.in_shapes[0], eq.in_shapes[1]
    columns = indices.columns or ()
    same_rows = operand.small[dim] == table.small[indices.dim] and operand.large[dim] == table.large[indices.dim]
    return same_rows and [index_map[column] for column in columns] == [dim]


def gather(eq: Equation) -> AnyState:
    """`operand[indices]`: the result's batch dim comes from the indices if they hold examples, else from the operand."""
    operand = settle(eq.ins[0], eq.in_shapes[0])
    indices = _indices(eq.ins[1], eq.in_shapes[1])
    if isinstance(indices, Independent):
        return _gather_windows(eq, operand)
    if isinstance(operand, Sum):
        raise Mixing(BACKFLOW)
    if isinstance(operand, PerExample):
        return _gather_rows(eq, operand, indices)
    if isinstance(indices, OwnIndex):
        raise Mixing(POSITION)
    return PerExample(_gathered_dim(eq, indices), indices.outer, operand.ratio)


def _gathered_dim(eq: Equation, indices: PerExample | OwnIndex) -> int:
    return _index_dims(len(eq.out.small), eq.params["dimension_numbers"].offset_dims)[indices.dim]


def _gather_windows(eq: Equation, operand: Independent | PerExample | Sum) -> AnyState:
    """The same places of every example: the window must take the whole batch dim."""
    numbers, zeros = eq.params["dimension_numbers"], (0,) * eq.rank
    whole(operand, (zeros, zeros), eq.both("slice_sizes"), (1,) * eq.rank, eq.in_shapes[0])
    if not isinstance(operand, PerExample):
        return operand
    windows = _windows(eq.rank, (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims), numbers.offset_dims)
    if operand.dim not in windows:
        raise Mixing(OTHERS)
    return PerExample(windows[operand.dim], operand.outer, operand.ratio)


def _gather_rows(eq: Equation, operand: PerExample, indices: PerExample | OwnIndex) -> PerExample:
    """Every example looks into itself."""
    numbers = eq.params["dimension_numbers"]
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    one_row = {sizes[operand.dim] for sizes in eq.both("slice_sizes")} == {1}
    if not one_row or indices.outer not in (None, operand.outer):
        raise Mixing(OTHERS)
    if not _own_row(eq, indices, operand.dim, batching, numbers.start_index_map):
        raise Mixing(OTHERS)
    return PerExample(_gathered_dim(eq, indices), operand.outer, operand.ratio)


def scatter(eq: Equation) -> AnyState:
    """`operand.at[indices].set(updates)` and its kin. Only set and add may pass sums; only add may make them."""
    adds = eq.name in ("scatter-add", "scatter_add", "scatter-sub", "scatter_sub")
    if eq.name == "scatter" and eq.params.get("update_jaxpr") is not None:
        raise Mixing("a scatter with a function of its own")
    indices, dim = _indices(eq.ins[1], eq.in_shapes[1]), eq.in_shapes[0].batch_dim()
    if adds and dim is None and isinstance(indices, PerExample):
        return _scatter_sum(eq, indices)
    result = _scatter_windows(eq, dim) if isinstance(indices, Independent) else _scatter_rows(eq, indices, dim)
    return result if adds or eq.name == "scatter" else only_per_example([settle(result, eq.out)])


def _scatter_windows(eq: Equation, dim: int | None) -> AnyState:
    """The same places of every example are written: the updates' batch dim must be the operand's, whole."""
    numbers, (operand, _, updates) = eq.params["dimension_numbers"], eq.in_shapes
    windows = _windows(eq.rank, (*numbers.inserted_window_dims, *numbers.operand_batching_dims), numbers.update_window_dims)
    place = updates.batch_dim()
    if place != (None if dim is None else windows.get(dim, -1)):
        raise Mixing(OTHERS)
    if dim is not None and place is not None and updates.small[place] != operand.small[dim]:
        raise Mixing(OTHERS)
    return _written(eq, dim, None)


def _scatter_rows(eq: Equation, indices: PerExample | OwnIndex, dim: int | None) -> AnyState:
    """Every example writes into itself."""
    numbers = eq.params["dimension_numbers"]
    batching = dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    if dim is None or dim not in (*numbers.inserted_window_dims, *batching):
        raise Mixing(OTHERS)
    place = _index_dims(len(eq.in_shapes[2].small), numbers.update_window_dims)[indices.dim]
    if eq.in_shapes[2].batch_dim() != place or not _own_row(eq, indices, dim, batching, numbers.scatter_dims_to_operand_dims):
        raise Mixing(OTHERS)
    return _written(eq, dim, indices.outer)


def _written(eq: Equation, dim: int | None, outer: int | None) -> AnyState:
    """The claim of old and new entries together, in the operand's dims. `outer`: the layout that the indices have."""
    old, new = ((eq.ins[i], eq.in_shapes[i]) for i in (0, 2))
    outers = {state.outer for state, _ in (old, new) if isinstance(state, PerExample)}
    outers |= set() if outer is None else {outer}
    if len(outers) > 1:
        raise Mixing(LAYOUT)
    layout = PerExample(-1 if dim is None else dim, outers.pop() if outers else 1)
    claims = [] if is_zero(old[0]) else [settle(*old, layout)]
    if not is_zero(new[0]):
        update = settle(*new)
        claims.append(replace(layout, ratio=update.ratio) if isinstance(update, PerExample) else update)
    return total(claims, eq.out)


def _scatter_sum(eq: Equation, indices: PerExample) -> AnyState:
    """Examples add into a shared array: a sum over them (a histogram, the gradient of a lookup)."""
    place = _index_dims(len(eq.in_shapes[2].small), eq.params["dimension_numbers"].update_window_dims)[indices.dim]
    updates = settle(eq.ins[2], eq.in_shapes[2], PerExample(place, indices.outer))
    if updates != PerExample(place, indices.outer, updates.ratio):
        raise Mixing(OTHERS)
    return total([eq.ins[0], Sum(snap(updates.ratio * eq.out.factor))], eq.out)


def dynamic_slice(eq: Equation) -> AnyState:
    """A start on the batch dim is clamped to 0 when the window takes all of it."""
    _plain_starts(eq, 1)
    operand, zeros = settle(eq.ins[0], eq.in_shapes[0]), (0,) * eq.rank
    return whole(operand, (zeros, zeros), eq.both("slice_sizes"), (1,) * eq.rank, eq.in_shapes[0])


def dynamic_update_slice(eq: Equation) -> AnyState:
    _plain_starts(eq, 2)
    operand, update = eq.in_shapes[:2]
    dim = operand.batch_dim()
    if dim != update.batch_dim() or (dim is not None and operand.small[dim] != update.small[dim]):
        raise Mixing(OTHERS)
    return total(eq.ins[:2], operand)


def _plain_starts(eq: Equation, position: int) -> None:
    starts = zip(eq.ins[position:], eq.in_shapes[position:], strict=True)
    if only_per_example([settle(state, shapes) for state, shapes in starts]) != INDEPENDENT:
        raise Mixing(OTHERS)


_SCATTERS = ("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max")

RULES = {
    "gather": Rule(gather, varies=("slice_sizes",), places=True),
    **dict.fromkeys((*_SCATTERS, "scatter-mul", "scatter-min", "scatter-max"), Rule(scatter, places=True)),
    "dynamic_slice": Rule(dynamic_slice, varies=("slice_sizes",)),
    "dynamic_update_slice": Rule(dynamic_update_slice),
}
