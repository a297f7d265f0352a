"""One equation as rules see it: the two programs' versions side by side, with the states of its operands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jzero.reduction.states import (
    BACKFLOW,
    PAIRS,
    AnyState,
    Claim,
    Constant,
    Independent,
    Mixing,
    PerExample,
    Shapes,
    Sum,
    first,
    settle,
    spread,
)


class Equation(NamedTuple):
    name: str
    params: Mapping[str, Any]  # of the small program
    large_params: Mapping[str, Any]
    ins: tuple[AnyState, ...]
    in_shapes: tuple[Shapes, ...]
    out_shapes: tuple[Shapes, ...]
    in_dtypes: tuple[Any, ...]
    out_dtypes: tuple[Any, ...]

    @property
    def out(self) -> Shapes:
        return self.out_shapes[0]

    @property
    def rank(self) -> int:
        return len(self.in_shapes[0].small)

    def both(self, name: str) -> tuple[Any, Any]:
        return self.params[name], self.large_params[name]


class Rule(NamedTuple):
    """How one primitive acts on states. `varies`: parameters that may differ between the two programs.

    `places`: the rule looks at operands that are places in the batch or depend on its size; to the others they are refused.
    `spreads`: an operand without examples may become per-example (a broadcast, a random draw), instead of a position.
    """

    apply: Callable[[Equation], AnyState | Sequence[AnyState]]
    varies: tuple[str, ...] = ()
    places: bool = False
    spreads: bool = False


def align(state: AnyState, source: Shapes, target: Shapes, layout: PerExample | None) -> Claim:
    """The state after numpy's broadcast of `source` to `target`, which pointwise primitives do by themselves."""
    if isinstance(state, Constant):
        return settle(state, target, layout)
    claim = settle(state, source, layout)
    if isinstance(claim, Independent):
        return spread(claim, target, layout)
    if isinstance(claim, PerExample) and target.varying() != (claim.dim,):
        raise Mixing(PAIRS)
    if isinstance(claim, Sum) and target.varying():
        raise Mixing(BACKFLOW)
    return claim


def aligned(eq: Equation) -> list[Claim]:
    """All operands broadcast to the shape of the result."""
    layout = first(PerExample, eq.ins)
    return [align(state, shapes, eq.out, layout) for state, shapes in zip(eq.ins, eq.in_shapes, strict=True)]


def settled(eq: Equation) -> list[Claim]:
    """All operands with constants turned into claims."""
    layout = first(PerExample, eq.ins)
    return [settle(state, shapes, layout) for state, shapes in zip(eq.ins, eq.in_shapes, strict=True)]
