"""Rules of primitives that move entries without computing: the batch dim is renamed, or must stay whole."""

import math
from collections.abc import Callable
from dataclasses import replace

from jzero.reduction.equation import Equation, Rule, align, settled
from jzero.reduction.states import (
    LAYOUT,
    POSITION,
    AnyState,
    Constant,
    Independent,
    Mixing,
    OwnIndex,
    PerExample,
    Shapes,
    Sum,
    first,
    is_zero,
    settle,
    spread,
    total,
)

CUT = "the batch dim is cut, so that a result holds only some of the examples"


def renamed(state: AnyState, new: Callable[[int], int]) -> AnyState:
    """The state after its batch dim `d`, if it has one, became `new(d)`."""
    return replace(state, dim=int(new(state.dim))) if isinstance(state, PerExample | OwnIndex) else state


def last_dim_moves(eq: Equation, state: AnyState, new: int) -> None:
    """`OwnIndex` with columns names entries of the last dim, which must then stay the last."""
    if isinstance(state, OwnIndex) and state.columns is not None and new != len(eq.out.small) - 1:
        raise Mixing(POSITION)


def transpose(eq: Equation) -> AnyState:
    state, order = eq.ins[0], tuple(eq.params["permutation"])
    last_dim_moves(eq, state, order.index(eq.rank - 1))
    return renamed(state, order.index)


def broadcast(eq: Equation) -> AnyState:
    state, target = eq.ins[0], eq.params["broadcast_dimensions"]
    if isinstance(state, Independent):
        return spread(state, eq.out)
    if isinstance(state, OwnIndex):
        last_dim_moves(eq, state, int(target[-1]))
    if isinstance(state, Sum) and eq.out.varying():
        raise Mixing("a sum over the examples is broadcast back to per-example values")
    eq.out.batch_dim()  # refuses a second dim of the batch's size
    return renamed(state, target.__getitem__)


def squeeze(eq: Equation) -> AnyState:
    state, gone = eq.ins[0], {d % eq.rank for d in eq.params["dimensions"]}
    if not isinstance(state, PerExample | OwnIndex):
        return state
    if state.dim in gone or (isinstance(state, OwnIndex) and state.columns is not None and eq.rank - 1 in gone):
        raise Mixing(POSITION)
    return replace(state, dim=state.dim - sum(d < state.dim for d in gone))


def relocate(state: PerExample, source: Shapes, target: Shapes) -> PerExample:
    """Where the batch factor of a row-major array lands after a reshape, alone or merged with others into one dim."""
    batch, rest = source.batch * source.factor, math.prod(source.large[state.dim + 1 :])
    block = source.large[state.dim] // (state.outer * batch) * rest  # consecutive entries of one example
    for dim, size in enumerate(target.large):
        after = math.prod(target.large[dim + 1 :])
        if after and block % after == 0 and size and size % (batch * (block // after)) == 0:
            return PerExample(dim, size // (batch * (block // after)), state.ratio)
    raise Mixing("a reshape merges the batch dim with others so that examples are no longer apart")


def reshape(eq: Equation) -> AnyState:
    state = eq.ins[0]
    if eq.params.get("dimensions") is not None:
        raise Mixing("a reshape with an order of its own")
    if isinstance(state, PerExample):
        return relocate(state, eq.in_shapes[0], eq.out)
    if isinstance(state, OwnIndex):
        moved = relocate(PerExample(state.dim), eq.in_shapes[0], eq.out)
        whole = eq.out.large[moved.dim] == eq.in_shapes[0].large[state.dim]
        if not whole or moved.outer != 1 or state.columns is not None:
            raise Mixing(POSITION)
        return replace(state, dim=moved.dim)
    return state


def iota(eq: Equation) -> AnyState:
    dim = eq.out.batch_dim()
    if dim is None:
        return Independent()
    return OwnIndex(dim) if dim == eq.params["dimension"] else PerExample(dim)


def whole(state: AnyState, starts: tuple, limits: tuple, strides: tuple, shapes: Shapes) -> AnyState:
    """`state` if the window takes all of the batch dim, and the same of the others in both programs."""
    for d, size in enumerate(zip(shapes.small, shapes.large, strict=True)):
        if isinstance(state, PerExample) and d == state.dim:
            if (starts[0][d], starts[1][d]) != (0, 0) or (limits[0][d], limits[1][d]) != size or strides[d] != 1:
                raise Mixing(CUT)
        elif starts[0][d] != starts[1][d] or limits[0][d] != limits[1][d]:
            raise Mixing(POSITION)
    return state


def slice_(eq: Equation) -> AnyState:
    strides = eq.params["strides"] or (1,) * eq.rank
    return whole(eq.ins[0], eq.both("start_indices"), eq.both("limit_indices"), strides, eq.in_shapes[0])


def pad(eq: Equation) -> AnyState:
    state, value = eq.ins
    if isinstance(state, PerExample) and any(eq.params["padding_config"][state.dim]):
        raise Mixing("the batch dim is padded")
    if state == value:
        return state
    if is_zero(value):
        return settle(state, eq.in_shapes[0])
    return total([state, align(value, eq.in_shapes[1], eq.out, first(PerExample, [state]))], eq.out)


def concatenate(eq: Equation) -> AnyState:
    dim = int(eq.params["dimension"])
    if first(OwnIndex, eq.ins):
        return index_columns(eq, dim)
    if any(shapes.batch_dim() == dim for shapes in eq.in_shapes):
        raise Mixing("arrays are concatenated along the batch dim")
    return side_by_side(eq)


def side_by_side(eq: Equation) -> AnyState:
    """The one claim of several arrays laid next to each other: that of their sum, had they the same shape."""
    layout = first(PerExample, eq.ins)
    parts = [(s, shapes) for s, shapes in zip(eq.ins, eq.in_shapes, strict=True) if not is_zero(s)]
    return total([settle(state, shapes, layout) for state, shapes in parts], eq.in_shapes[0])


def index_columns(eq: Equation, dim: int) -> OwnIndex:
    """`[arange(B), labels]` side by side in the last dim: the spelling of an index into several dims."""
    rows = [state for state in eq.ins if isinstance(state, PerExample | OwnIndex)]
    outers = {state.outer for state in rows if state.outer is not None}
    if dim != eq.rank - 1 or len({state.dim for state in rows}) > 1 or rows[0].dim == dim or len(outers) > 1:
        raise Mixing(LAYOUT)
    columns, start = [], 0
    for state, shapes in zip(eq.ins, eq.in_shapes, strict=True):
        if isinstance(state, OwnIndex):
            inside = range(shapes.small[dim]) if state.columns is None else state.columns
            columns += [start + c for c in inside]
        elif not isinstance(state, Constant | PerExample) or (isinstance(state, PerExample) and state.ratio != 1):
            raise Mixing(LAYOUT)
        start += shapes.small[dim]
    return OwnIndex(rows[0].dim, tuple(columns), outers.pop() if outers else None)


def stack(eq: Equation) -> AnyState:
    axis = eq.params["axis"] % (eq.rank + 1)
    return renamed(side_by_side(eq), lambda dim: dim + (axis <= dim))


def unstack(eq: Equation) -> AnyState:
    axis, state = eq.params["axis"] % eq.rank, eq.ins[0]
    if isinstance(state, PerExample) and state.dim == axis:
        raise Mixing(CUT)
    return renamed(state, lambda dim: dim - (axis < dim))


def tile(eq: Equation) -> AnyState:
    state, (small, large) = settled(eq)[0], eq.both("reps")
    if isinstance(state, Independent):
        return spread(state, eq.out)  # whole copies, the batch dim their major factor
    if small != large or (isinstance(state, PerExample) and small[state.dim] != 1):
        raise Mixing("the batch is repeated")
    return state


RULES = {
    "transpose": Rule(transpose, places=True),
    "broadcast_in_dim": Rule(broadcast, varies=("shape",), places=True, spreads=True),
    "squeeze": Rule(squeeze, places=True),
    "reshape": Rule(reshape, varies=("new_sizes",), places=True),
    "iota": Rule(iota, varies=("shape",), spreads=True),
    "slice": Rule(slice_, varies=("start_indices", "limit_indices")),
    "pad": Rule(pad),
    "concatenate": Rule(concatenate, places=True),
    "stack": Rule(stack),
    "unstack": Rule(unstack),
    "tile": Rule(tile, varies=("reps",), spreads=True),
}
