"""Rules of pointwise primitives: which of them a sum over examples may pass, and how ratios multiply."""

import math
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jzero.reduction.equation import Equation, Rule, align, aligned
from jzero.reduction.states import (
    BACKFLOW,
    GROWS,
    INDEPENDENT,
    NONLINEAR,
    ONE,
    QUOTIENT,
    AnyState,
    Claim,
    Constant,
    Independent,
    Mixing,
    OwnIndex,
    PerExample,
    Sum,
    first,
    is_zero,
    join,
    same_layout,
    snap,
    total,
)


def only_per_example(states: Sequence[Claim]) -> Independent | PerExample:
    """The claim of a nonlinear function of `states`: each example by itself, and nothing scaled."""
    sums, rows = first(Sum, states), [s for s in states if isinstance(s, PerExample)]
    if sums:
        raise Mixing(BACKFLOW if rows else NONLINEAR)
    if any(state.ratio != ONE for state in states):
        raise Mixing(GROWS)
    return same_layout(rows) if rows else INDEPENDENT


def nonlinear(eq: Equation) -> Independent | PerExample:
    return only_per_example(aligned(eq))


def same(eq: Equation) -> AnyState:
    """One operand, changed in no way that matters here."""
    return eq.ins[0]


def linear(eq: Equation) -> AnyState:
    return aligned(eq)[0]


def add(eq: Equation) -> AnyState:
    """A zero adds nothing but its shape."""
    layout = first(PerExample, eq.ins)
    terms = [(s, shapes) for s, shapes in zip(eq.ins, eq.in_shapes, strict=True) if not is_zero(s)]
    return total([align(state, shapes, eq.out, layout) for state, shapes in terms], eq.out)


def product(states: Sequence[Claim]) -> Claim:
    """The claim of any product of `states` that is linear in each: at most one of them is a sum."""
    ratio = snap(math.prod((state.ratio for state in states), start=ONE))
    rows = [state for state in states if isinstance(state, PerExample)]
    num_sums = sum(isinstance(state, Sum) for state in states)
    if num_sums and rows:
        raise Mixing(BACKFLOW)
    if num_sums > 1:
        raise Mixing("two sums over the examples are multiplied")
    if rows:
        layout = same_layout(rows)
        return PerExample(layout.dim, layout.outer, ratio)
    return Sum(ratio) if num_sums else Independent(ratio)


def multiply(eq: Equation) -> Claim:
    return product(aligned(eq))


def divide(eq: Equation) -> Claim:
    if np.issubdtype(eq.out_dtypes[0], np.integer):  # rounds, so it is not linear
        return nonlinear(eq)
    over, under = aligned(eq)
    if isinstance(under, Sum):
        raise Mixing(QUOTIENT if isinstance(over, Sum) else NONLINEAR)
    return product([over, replace(under, ratio=1 / under.ratio)])


def select(eq: Equation) -> AnyState:
    """`select_n(which, *cases)`: a known `which` picks; else every case must support the same claim."""
    which, cases = eq.ins[0], eq.ins[1:]
    if isinstance(which, Constant) and which.small == which.large:
        return cases[int(which.small)]
    layout = first(PerExample, eq.ins)
    chosen = only_per_example([align(which, eq.in_shapes[0], eq.out, layout)])
    result = join(cases, eq.out)
    if isinstance(chosen, PerExample) and isinstance(result, PerExample):
        same_layout([chosen, result])
    if isinstance(chosen, PerExample) and isinstance(result, OwnIndex):
        raise Mixing("an arange along the batch is selected by example")
    return result


def compare(eq: Equation) -> AnyState:
    """An index is never negative: indexing in jax.numpy asks, and wraps it if it is."""
    if isinstance(eq.ins[0], OwnIndex) and eq.ins[1] == Constant(0, 0):
        return Constant(eq.name == "ge", eq.name == "ge")
    if first(OwnIndex, eq.ins):
        raise Mixing("places in the batch are compared")
    return nonlinear(eq)


def convert(eq: Equation) -> AnyState:
    """Widening is linear, and so, but for rounding, is any conversion to floating point."""
    source, target = eq.in_dtypes[0], eq.out_dtypes[0]
    if isinstance(eq.ins[0], OwnIndex):
        holds = target.kind in "iu" and jnp.iinfo(target).max >= eq.out.large[eq.ins[0].dim]
        return eq.ins[0] if holds else nonlinear(eq)
    return linear(eq) if jnp.issubdtype(target, jnp.inexact) or np.can_cast(source, target) else nonlinear(eq)


def fold_in(eq: Equation) -> AnyState:
    """A key per example, from its place: the engine makes draws differ between shards anyway."""
    key, data = eq.ins
    return PerExample(data.dim) if isinstance(data, OwnIndex) and key == INDEPENDENT else nonlinear(eq)


# `random_wrap` and `random_unwrap` only add or drop trailing dims
_NONLINEAR = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz cos cosh digamma
eq eq_to erf erf_inv erfc exp exp2 expm1 floor gt igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p
log2 logistic lt_to max min mulhi ne nextafter not one_minus_square or polygamma population_count pow
regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
tan tanh xor zeta
random_clone random_gamma random_seed random_unwrap random_wrap threefry2x32
"""

RULES = {
    **dict.fromkeys(_NONLINEAR.split(), Rule(nonlinear)),
    **dict.fromkeys(("lt", "ge"), Rule(compare, places=True)),
    **dict.fromkeys(("neg", "real", "imag", "conj", "reduce_precision"), Rule(linear)),
    **dict.fromkeys(("copy", "copy_p", "name", "stop_gradient"), Rule(same, places=True)),
    **dict.fromkeys(("sharding_constraint", "reshard", "layout_constraint"), Rule(same, places=True)),
    **dict.fromkeys(("add", "add_any", "sub", "complex"), Rule(add)),
    "mul": Rule(multiply),
    "div": Rule(divide),
    "select_n": Rule(select, places=True),
    "convert_element_type": Rule(convert, places=True),
    "random_fold_in": Rule(fold_in, places=True),
}
