"""What the examples of a batch have done to a value: the states, and the algebra that rules share.

Each state is a claim about a value `v(X)` when the batch `X` is cut into N equal shards `X_1 .. X_N`:

    Independent(ratio)        v(X) = ratio * v(X_i), whichever shard
    PerExample(dim, ratio)    v(X) = ratio * concatenate(v(X_1) .. v(X_N)) along dim
    Sum(ratio)                v(X) = ratio * mean(v(X_1) .. v(X_N)): ratio N for a sum, 1 for a mean
    Mixed(reason, where)      none of these is known to hold

The claims hold for every parameter value, so their derivatives hold too: the gradient of a `Sum` loss is the mean (or sum)
of the shards' gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

ONE = Fraction(1)

BACKFLOW = "a sum over the examples flows back into per-example values"
GROWS = "the batch size, or a value that scales with it, enters a nonlinear function"
INHOMOGENEOUS = "two terms are combined that grow differently with the batch (a sum over examples beside a mean or a constant)"
NONLINEAR = "a nonlinear function is taken of a sum over the examples"
PAIRS = "examples meet examples: the result has one entry for every pair"
POSITION = "a value that depends on the place in the batch (an arange along it) or on the batch size meets the examples"
QUOTIENT = "a sum over examples is divided by another: return jzero.weighted(sum, weight) to keep this exact and fast"
LAYOUT = "per-example values are combined whose batch dims do not line up"


@dataclass(frozen=True, slots=True)
class Independent:
    """Does not depend on the batch, except by a factor that the batch size sets."""

    ratio: Fraction = ONE


@dataclass(frozen=True, slots=True)
class PerExample:
    """Example i owns entry i of `dim`, or block i of a merged one. `outer` > 1: the batch is not the merge's major factor."""

    dim: int
    outer: int = 1
    ratio: Fraction = ONE


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum over all examples, times factors that do not depend on them."""

    ratio: Fraction


@dataclass(frozen=True, slots=True)
class Mixed:
    """The examples meet in some other way; `where` is the user's line and function."""

    reason: str
    where: str


@dataclass(frozen=True, slots=True)
class Constant:
    """Internal: every entry is one known number, `small` in the first program and `large` in the second."""

    small: float
    large: float


@dataclass(frozen=True, slots=True)
class OwnIndex:
    """Internal: each entry is its own index along `dim`, the batch dim. `columns`: only these entries of the last dim."""

    dim: int
    columns: tuple[int, ...] | None = None
    outer: int | None = None


@dataclass(frozen=True, slots=True)
class Sized:
    """Internal: independent of the examples, but not of how many there are or of their places."""


State = Independent | PerExample | Sum | Mixed
AnyState = State | Constant | OwnIndex | Sized
Claim = Independent | PerExample | Sum
INDEPENDENT = Independent()


class Mixing(Exception):
    """Raised by a rule when the examples meet; the walk adds the line."""


class Shapes(NamedTuple):
    """One array's shape in the two programs, whose batch sizes are `batch` and `factor` times that."""

    small: tuple[int, ...]
    large: tuple[int, ...]
    batch: int
    factor: int

    def varying(self) -> tuple[int, ...]:
        return tuple(d for d, (a, b) in enumerate(zip(self.small, self.large, strict=True)) if a != b)

    def grows(self, dim: int, outer: int = 1) -> bool:
        """Whether `dim` holds whole examples: it grows in step with the batch."""
        size = self.small[dim]
        return size > 0 and self.large[dim] == self.factor * size and size % (outer * self.batch) == 0

    def batch_dim(self) -> int | None:
        """The one dim that the batch size sets, or None."""
        dims = self.varying()
        if len(dims) > 1:
            raise Mixing(PAIRS)
        if dims and not self.grows(dims[0]):
            raise Mixing("a dim depends on the batch size but is no multiple of it")
        return dims[0] if dims else None


def is_zero(state: AnyState) -> bool:
    """A known zero satisfies every claim, so it is neutral in sums and selections."""
    return isinstance(state, Constant) and state.small == 0 and state.large == 0


def no_examples(state: AnyState) -> bool:
    return isinstance(state, Independent | Constant | OwnIndex | Sized)


def is_plain(state: AnyState) -> bool:
    """The very same in every shard."""
    return state == INDEPENDENT or (isinstance(state, Constant) and state.small == state.large)


def snap(value: Fraction | float) -> Fraction:
    """A ratio as the nearby simple fraction: literals are rounded to fp32, and 1/3 must stay 1/3."""
    simple = Fraction(value).limit_denominator(1 << 16)
    return simple if math.isclose(simple, value, rel_tol=1e-6) else Fraction(value)


def constant_ratio(constant: Constant) -> Fraction:
    small, large = constant.small, constant.large
    if small == large or (small != small and large != large):  # equal, or nan in both
        return ONE
    if isinstance(small, complex) or not (math.isfinite(small) and math.isfinite(large)) or 0 in (small, large):
        raise Mixing(POSITION)
    return snap(Fraction(large) / Fraction(small))


def settle(state: AnyState, shapes: Shapes, layout: PerExample | None = None) -> Claim:
    """A constant as the claim it satisfies. Being uniform it fits any `layout` of the batch dim."""
    if isinstance(state, Sized | OwnIndex | Mixed):
        raise Mixing(POSITION)
    if not isinstance(state, Constant):
        return state
    return spread(Independent(constant_ratio(state)), shapes, layout)


def spread(state: Independent, shapes: Shapes, layout: PerExample | None = None) -> Independent | PerExample:
    """A value without examples, repeated along the batch dim of `shapes` if there is one: copies for every example."""
    dim = shapes.batch_dim()
    if dim is None:
        return state
    return PerExample(dim, layout.outer if layout and layout.dim == dim else 1, state.ratio)


def same_layout(states: Sequence[PerExample]) -> PerExample:
    if len({(state.dim, state.outer) for state in states}) > 1:
        raise Mixing(LAYOUT)
    return states[0]


def first[T](kind: type[T], states: Sequence[AnyState]) -> T | None:
    return next((state for state in states if isinstance(state, kind)), None)


def join(states: Sequence[AnyState], shapes: Shapes) -> AnyState:
    """The claim that all of `states` satisfy, and so does any selection among them. All have `shapes`."""
    if mixed := first(Mixed, states):
        return mixed
    if all(state == states[0] for state in states):
        return states[0]
    layout = first(PerExample, states)
    return _agree([settle(state, shapes, layout) for state in states if not is_zero(state)])


def _agree(claims: Sequence[Claim]) -> Claim:
    """The one claim that all `claims` imply: what is the same in every shard is also its own mean."""
    if all(claim == claims[0] for claim in claims):
        return claims[0]
    rows = [claim for claim in claims if isinstance(claim, PerExample)]
    if rows and len(rows) < len(claims):
        raise Mixing(BACKFLOW)
    if rows:
        same_layout(rows)
    if len({claim.ratio for claim in claims}) > 1:
        raise Mixing(INHOMOGENEOUS)
    return Sum(claims[0].ratio)


def total(states: Sequence[AnyState], shapes: Shapes) -> Claim | Constant:
    """The claim of the sum of `states`. Unlike in `join`, two equal constants do not make that constant."""
    layout = first(PerExample, states)
    claims = [settle(state, shapes, layout) for state in states if not is_zero(state)]
    return _agree(claims) if claims else Constant(0, 0)


def upper_bound(states: Sequence[AnyState], shapes: Shapes, where: str) -> AnyState:
    """`join` for values that meet in control flow, where a failure is a state and not an exception."""
    try:
        return join(states, shapes)
    except Mixing as mixing:
        return Sized() if all(map(no_examples, states)) else Mixed(str(mixing), where)


def fits(state: AnyState, shapes: Shapes) -> bool:
    """Whether the claim is possible for an array of these shapes: a last check on every rule."""
    varying = shapes.varying()
    if isinstance(state, Independent | Sum):
        return not varying
    if isinstance(state, PerExample):
        return varying == (state.dim,) and shapes.grows(state.dim, state.outer)
    return not isinstance(state, OwnIndex) or state.dim in varying
