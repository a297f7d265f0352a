"""Rules of gathers, scatters and dynamic slices: an example may look into shared tables and into itself, not into others."""

from jzero.reduction.equation import Equation, Rule, align, settled
from jzero.reduction.moves import whole
from jzero.reduction.pointwise import only_per_example
from jzero.reduction.states import (
    BACKFLOW,
    INDEPENDENT,
    ONE,
    PAIRS,
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


def _outer_dims(rank: int, window_dims: tuple[int, ...]) -> list[int]:
    """The dims of a gather's result (or a scatter's updates) that belong to the indices, in the indices' order."""
    return [d for d in range(rank) if d not in window_dims]


def _windows(rank: int, dropped: tuple[int, ...], window_dims: tuple[int, ...]) -> dict[int, int]:
    """Operand dim -> the dim of the result (or updates) that its window runs along."""
    kept = [d for d in range(rank) if d not in dropped]
    return dict(zip(kept, map(int, window_dims), strict=True))


def _indices(state: AnyState, shapes: Shapes) -> Independent | PerExample | OwnIndex:
    if isinstance(state, OwnIndex):
        if state.columns is None:
            return OwnIndex(state.dim, tuple(range(shapes.small[-1])))
        return state
    return only_per_example([settle(state, shapes)])


def gather(eq: Equation) -> AnyState:
    """`operand[indices]`: the result's batch dim comes from the indices if they hold examples, else from the operand."""
    operand = settle(eq.ins[0], eq.in_shapes[0])
    indices = _indices(eq.ins[1], eq.in_shapes[1])
    if isinstance(indices, Independent):
        return _gather_windows(eq, operand)
    numbers = eq.params["dimension_numbers"]
    if indices.dim == len(eq.in_shapes[1].small) - 1:
        raise Mixing(OTHERS)
    if isinstance(operand, Sum):
        raise Mixing(BACKFLOW)
    if isinstance(operand, PerExample):
        batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
        _check_own_row(eq, operand, indices, batching, numbers.start_index_map)
    elif isinstance(indices, OwnIndex):
        raise Mixing(POSITION)
    out = _outer_dims(len(eq.out.small), numbers.offset_dims)[indices.dim]
    return PerExample(out, operand.outer if isinstance(operand, PerExample) else indices.outer, operand.ratio)


def _gather_windows(eq: Equation, operand: AnyState) -> AnyState:
    """The same places of every example: the window must take the whole batch dim."""
    numbers, shapes = eq.params["dimension_numbers"], eq.in_shapes[0]
    starts = ((0,) * eq.rank,) * 2
    whole(operand, starts, eq.both("slice_sizes"), (1,) * eq.rank, shapes)
    if not isinstance(operand, PerExample):
        return operand
    windows = _windows(eq.rank, (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims), numbers.offset_dims)
    if operand.dim not in windows:
        raise Mixing(OTHERS)
    return PerExample(windows[operand.dim], operand.outer, operand.ratio)


def _check_own_row(eq: Equation, operand: PerExample, indices: PerExample | OwnIndex, batching: dict, index_map: tuple) -> None:
    """Row i of the indices must look into row i of the operand: by a batching dim, or by a column of own indices."""
    if isinstance(indices, OwnIndex):
        own = operand.dim in [index_map[c] for c in indices.columns] and indices.outer in (None, operand.outer)
        rows = [(getattr(shapes, size)[dim]) for size in ("small", "large") for shapes, dim in (
            (eq.in_shapes[0], operand.dim), (eq.in_shapes[1], indices.dim))]  # fmt: skip
        aligned = own and len(indices.columns) == 1 and rows[0] == rows[1] and rows[2] == rows[3]
    else:
        aligned = batching.get(operand.dim) == indices.dim and indices.outer == operand.outer
    if not aligned:
        raise Mixing(OTHERS)


def scatter(*, linear: bool, adds: bool = False):
    """`operand.at[indices].set(updates)` and its kin. Only set and add may pass sums; only add may make them."""

    def rule(eq: Equation) -> AnyState:
        if eq.params.get("update_jaxpr") is not None and not adds:
            raise Mixing("a scatter with a function")
        indices = _indices(eq.ins[1], eq.in_shapes[1])
        if isinstance(indices, Independent):
            result = _scatter_windows(eq)
        elif isinstance(settle(eq.ins[0], eq.in_shapes[0]), PerExample):
            result = _scatter_rows(eq, indices)
        elif adds and isinstance(indices, PerExample):
            return _scatter_sum(eq, indices)
        else:
            raise Mixing(OTHERS)
        return result if linear or is_zero(result) else only_per_example([settle(result, eq.out)])

    return rule


def _update_dim(eq: Equation) -> int | None:
    return eq.in_shapes[2].batch_dim()


def _scatter_windows(eq: Equation) -> AnyState:
    """The same places of every example are written: the updates' batch dim must be the operand's, whole."""
    numbers, dim = eq.params["dimension_numbers"], eq.in_shapes[0].batch_dim()
    windows = _windows(eq.rank, (*numbers.inserted_window_dims, *numbers.operand_batching_dims), numbers.update_window_dims)
    if dim is None:
        if _update_dim(eq) is not None:
            raise Mixing(OTHERS)
    elif windows.get(dim) is None or windows[dim] != _update_dim(eq) or eq.in_shapes[2].small[windows[dim]] != eq.in_shapes[0].small[dim]:
        raise Mixing(OTHERS)
    return _written(eq)


def _written(eq: Equation) -> AnyState:
    """The claim of old and new entries together, in the operand's dims."""
    operand, updates = eq.ins[0], eq.ins[2]
    if not is_zero(updates):
        updates = settle(updates, eq.in_shapes[2], operand if isinstance(operand, PerExample) else None)
    if isinstance(updates, PerExample):
        updates = PerExample(eq.in_shapes[0].batch_dim(), updates.outer, updates.ratio)
    return total([operand, updates], eq.in_shapes[0])


def _scatter_rows(eq: Equation, indices: PerExample | OwnIndex) -> AnyState:
    """Every example writes into itself."""
    numbers = eq.params["dimension_numbers"]
    operand = settle(eq.ins[0], eq.in_shapes[0], indices if isinstance(indices, PerExample) else None)
    batching = dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    if isinstance(indices, PerExample):
        operand = PerExample(operand.dim, indices.outer, operand.ratio) if operand.dim in batching else operand
    _check_own_row(eq, operand, indices, batching, numbers.scatter_dims_to_operand_dims)
    if _update_dim(eq) != _outer_dims(len(eq.in_shapes[2].small), numbers.update_window_dims)[indices.dim]:
        raise Mixing(OTHERS)
    return _written(eq)


def _scatter_sum(eq: Equation, indices: PerExample) -> AnyState:
    """Examples add into a shared array: a sum over them (a histogram, the gradient of a lookup)."""
    numbers = eq.params["dimension_numbers"]
    updates = settle(eq.ins[2], eq.in_shapes[2], indices)
    place = _outer_dims(len(eq.in_shapes[2].small), numbers.update_window_dims)[indices.dim]
    if updates != PerExample(place, indices.outer, updates.ratio):
        raise Mixing(OTHERS)
    return total([eq.ins[0], Sum(snap(updates.ratio * eq.out.factor))], eq.out)


def dynamic_slice(eq: Equation) -> AnyState:
    """A start on the batch dim is clamped to 0 when the window takes all of it."""
    operand = settle(eq.ins[0], eq.in_shapes[0])
    _plain_starts(eq, 1)
    return whole(operand, ((0,) * eq.rank,) * 2, eq.both("slice_sizes"), (1,) * eq.rank, eq.in_shapes[0])


def dynamic_update_slice(eq: Equation) -> AnyState:
    operand, update = eq.in_shapes[:2]
    _plain_starts(eq, 2)
    if operand.batch_dim() != update.batch_dim():
        raise Mixing(OTHERS)
    dim = operand.batch_dim()
    if dim is not None and operand.small[dim] != update.small[dim]:
        raise Mixing(OTHERS)
    return total(eq.ins[:2], operand)


def _plain_starts(eq: Equation, first_start: int) -> None:
    starts = zip(eq.ins[first_start:], eq.in_shapes[first_start:], strict=True)
    if only_per_example([settle(state, shapes) for state, shapes in starts]) != INDEPENDENT:
        raise Mixing(OTHERS)
