"""The walk over both programs in lockstep: states in, states out, one rule for each primitive."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jzero.reduction import along, draws, experts, index, moves, pointwise
from jzero.reduction.equation import Equation
from jzero.reduction.fold import fold
from jzero.reduction.programs import (
    Context,
    DifferentPrograms,
    changed_params,
    closed_over,
    is_literal,
    lockstep,
    open_jaxpr,
    source_line,
)
from jzero.reduction.states import (
    INDEPENDENT,
    INHOMOGENEOUS,
    NONLINEAR,
    POSITION,
    QUOTIENT,
    AnyState,
    Independent,
    Mixed,
    Mixing,
    OwnIndex,
    Sized,
    Sum,
    first,
    fits,
    is_plain,
    no_examples,
)

RULES = {**pointwise.RULES, **moves.RULES, **along.RULES, **index.RULES, **draws.RULES, **experts.RULES}


def walk(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> list[AnyState]:
    """The states of the outputs, given those of the inputs."""
    (small, small_consts), (large, large_consts) = open_jaxpr(small), open_jaxpr(large)
    counts = [(len(consts), len(j.invars), len(j.outvars)) for j, consts in ((small, small_consts), (large, large_consts))]
    if counts[0] != counts[1]:
        raise DifferentPrograms
    consts = [closed_over(a, b) for a, b in zip(small_consts, large_consts, strict=True)]
    known: dict[Any, tuple[Any, AnyState]] = {}
    _write(known, [*small.constvars, *small.invars], [*large.constvars, *large.invars], [*consts, *ins], lambda: "a closure")
    for a, b in lockstep(small, large):
        states = [_read(known, x, y) for x, y in zip(a.invars, b.invars, strict=True)]
        outs = context.steps.get(a.primitive.name, judge)(a, b, states, context)
        _write(known, a.outvars, b.outvars, outs, lambda eqn=a: source_line(eqn, context.call))
    return [_read(known, x, y) for x, y in zip(small.outvars, large.outvars, strict=True)]


def _read(known: Mapping[Any, tuple[Any, AnyState]], small: Any, large: Any) -> AnyState:
    if is_literal(small) and is_literal(large):
        return closed_over(small.val, large.val)
    if is_literal(small) or is_literal(large) or known[small][0] is not large:
        raise DifferentPrograms
    return known[small][1]


def _write(
    known: dict, smalls: Sequence[Any], larges: Sequence[Any], states: Sequence[AnyState], where: Callable[[], str]
) -> None:
    for small, large, state in zip(smalls, larges, states, strict=True):
        is_array = isinstance(small.aval, jax.core.ShapedArray)
        known[small] = (large, state if is_array else Mixed("a mutable reference is used", where()))


def judge(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """An ordinary primitive: its rule, with failures turned into `Mixed` and its promise checked against the shapes."""
    if mixed := first(Mixed, ins):
        return [_inherited(small, mixed, ins, context)] * len(small.outvars)
    eq = _equation(small, large, ins, context)
    try:
        found = _conclude(eq, bool(small.effects))
        outs = list(found) if isinstance(found, Sequence) else [found] * len(small.outvars)
        if not all(fits(state, shapes) for state, shapes in zip(outs, eq.out_shapes, strict=True)):
            raise Mixing("the batch dim is not where it was expected")
        return outs
    except Mixing as mixing:
        if all(map(no_examples, ins)) and not small.effects:
            return [Sized()] * len(small.outvars)
        return refuse(small, len(small.outvars), str(mixing), context)
    except (KeyError, AttributeError, IndexError, TypeError) as error:  # another version of jax spells its parameters otherwise
        return refuse(small, len(small.outvars), f"jzero's rule for it does not fit this version of jax ({error!r})", context)


def _inherited(eqn: Any, mixed: Mixed, ins: Sequence[AnyState], context: Context) -> Mixed:
    """The first cause stands, but for `sum(loss) / max(sum(mask), 1)`, where the quotient is what to tell the user about."""
    weighted = eqn.primitive.name == "div" and isinstance(ins[0], Sum) and mixed.reason.endswith((NONLINEAR, INHOMOGENEOUS))
    return Mixed(f"`div`: {QUOTIENT}", source_line(eqn, context.call)) if weighted else mixed


def _equation(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Equation:
    shapes = [tuple(map(context.shapes, a, b)) for a, b in ((small.invars, large.invars), (small.outvars, large.outvars))]
    dtypes = [tuple(v.aval.dtype for v in variables) for variables in (small.invars, small.outvars)]
    return Equation(small.primitive.name, small.params, large.params, tuple(ins), *shapes, *dtypes)


def _conclude(eq: Equation, has_effects: bool) -> AnyState | Sequence[AnyState]:
    """The checks that every rule shares, from the cheapest."""
    rule, changed = RULES.get(eq.name), changed_params(eq.params, eq.large_params)
    varying = any(shapes.varying() for shapes in (*eq.in_shapes, *eq.out_shapes))
    if rule and changed <= set(rule.varies) and (known := fold(eq)):
        return known
    if not changed and not varying and not has_effects and all(map(is_plain, eq.ins)):
        return INDEPENDENT
    if rule is None:
        raise Mixing("no rule is known for this primitive, so the examples may meet in it")
    if wrong := changed - set(rule.varies):
        raise Mixing(f"its parameter {min(wrong)!r} depends on the batch size")
    if not rule.places and any(isinstance(state, Sized | OwnIndex) for state in eq.ins):
        raise Mixing(POSITION)
    if changed and not rule.spreads and all(isinstance(state, Independent) for state in eq.ins):
        raise Mixing(POSITION)
    return rule.apply(eq)


def refuse(eqn: Any, num_outputs: int, reason: str, context: Context) -> list[Mixed]:
    return [Mixed(f"`{eqn.primitive.name}`: {reason}", source_line(eqn, context.call))] * num_outputs
