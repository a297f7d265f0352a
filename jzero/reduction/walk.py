"""The walk over both programs: states in, states out, and into the bodies of loops, branches and custom derivatives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from jzero.reduction import along, draws, index, moves, pointwise
from jzero.reduction.equation import Equation
from jzero.reduction.fold import fold
from jzero.reduction.programs import (
    Context,
    DifferentPrograms,
    changed_params,
    closed_over,
    inner,
    is_literal,
    lockstep,
    open_jaxpr,
    scan_counts,
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
    PerExample,
    Shapes,
    Sized,
    Sum,
    first,
    fits,
    is_plain,
    no_examples,
    upper_bound,
)

RULES = {**pointwise.RULES, **moves.RULES, **along.RULES, **index.RULES, **draws.RULES}
Step = Callable[[Any, Any, Sequence[AnyState], Context], Sequence[AnyState]]


def walk(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> list[AnyState]:
    """The states of the outputs, given those of the inputs."""
    (small, small_consts), (large, large_consts) = open_jaxpr(small), open_jaxpr(large)
    if len(small_consts) != len(large_consts) or len(small.outvars) != len(large.outvars):
        raise DifferentPrograms
    consts = [closed_over(a, b) for a, b in zip(small_consts, large_consts, strict=True)]
    known: dict[Any, tuple[Any, AnyState]] = {}
    _write(known, [*small.constvars, *small.invars], [*large.constvars, *large.invars], [*consts, *ins], lambda: "a closure")
    for a, b in lockstep(small, large):
        states = [_read(known, x, y) for x, y in zip(a.invars, b.invars, strict=True)]
        outs = STEPS.get(a.primitive.name, judge)(a, b, states, context)
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
        outs = _conclude(eq, bool(small.effects))
        outs = list(outs) if isinstance(outs, list | tuple) else [outs] * len(small.outvars)
        if not all(fits(state, shapes) for state, shapes in zip(outs, eq.out_shapes, strict=True)):
            raise Mixing("the batch dim is not where it was expected")
        return outs
    except Mixing as mixing:
        if all(map(no_examples, ins)) and not small.effects:
            return [Sized()] * len(small.outvars)
        return [Mixed(f"`{eq.name}`: {mixing}", source_line(small, context.call))] * len(small.outvars)


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


def _call(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """`jit`, `remat` and the like: the body is the meaning."""
    a, b = inner(small.params), inner(large.params)
    if a is None or b is None or len(open_jaxpr(a)[0].invars) != len(ins):
        return _refuse(small, len(small.outvars), "a call whose body cannot be read", context)
    if small.primitive.name in ("jit", "pjit"):
        context = context._replace(call=(small.params["name"], source_line(small, context.call)))
    return walk(a, b, ins, context)


def _refuse(eqn: Any, num_outputs: int, reason: str, context: Context) -> list[Mixed]:
    return [Mixed(f"`{eqn.primitive.name}`: {reason}", source_line(eqn, context.call))] * num_outputs


def _each(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    return ins


def _scan(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """Carries are followed to a fixpoint; a scan over the examples themselves must carry nothing."""
    if small.params["reverse"] != large.params["reverse"] or scan_counts(small.params) != scan_counts(large.params):
        raise DifferentPrograms(source_line(small))
    num_consts, num_carry = scan_counts(small.params)
    consts, carry, xs = ins[:num_consts], ins[num_consts : num_consts + num_carry], ins[num_consts + num_carry :]
    bodies = small.params["jaxpr"], large.params["jaxpr"]
    if small.params["length"] != large.params["length"]:
        return _over_examples(small, bodies, consts, carry, xs, context)
    slices = [_without_leading(state) for state in xs]

    def body(states: Sequence[AnyState]) -> list[AnyState]:
        return walk(*bodies, [*consts, *states, *slices], context)

    carry, outs = _fixpoint(small, body, carry, _shapes(small.outvars, large.outvars, context)[:num_carry], context)
    return [*carry, *map(_with_leading, outs[num_carry:])]


def _shapes(smalls: Sequence[Any], larges: Sequence[Any], context: Context) -> list[Shapes]:
    return [context.shapes(a, b) for a, b in zip(smalls, larges, strict=True)]


def _without_leading(state: AnyState) -> AnyState:
    return moves.renamed(state, state.dim - 1 if hasattr(state, "dim") else None)


def _with_leading(state: AnyState) -> AnyState:
    return moves.renamed(state, state.dim + 1 if hasattr(state, "dim") else None)


def _fixpoint(eqn: Any, body: Callable, carry: Sequence[AnyState], shapes: Sequence[Shapes], context: Context) -> tuple:
    """Carry states that one more iteration does not change, and the body's outputs under them."""
    where = source_line(eqn, context.call)
    for _ in range(4 * len(carry) + 2):  # each carry can climb constant, independent, sum, mixed
        outs = body(carry)
        after = [upper_bound(pair, s, where) for *pair, s in zip(carry, outs[: len(carry)], shapes, strict=True)]
        if after == list(carry):
            return after, outs
        carry = after
    carry = _refuse(eqn, len(carry), "the states of a loop do not settle", context)
    return carry, body(carry)


def _over_examples(
    eqn: Any, bodies: tuple, consts: Sequence, carry: Sequence, xs: Sequence, context: Context
) -> Sequence[AnyState]:
    """A map: one example's slice is to its own iteration what a parameter is to the program."""
    num_outputs = len(eqn.outvars)
    if carry:
        return _refuse(eqn, num_outputs, "a loop runs over the examples and carries values from one to the next", context)
    if mixed := first(Mixed, [*consts, *xs]):
        return [mixed] * num_outputs
    if not all(map(is_plain, consts)) or not all(x == PerExample(0) or is_plain(x) for x in xs):
        return _refuse(eqn, num_outputs, "a loop runs over the examples with values that depend on the others", context)
    outs = walk(*bodies, [*consts, *(INDEPENDENT if x == PerExample(0) else x for x in xs)], context)
    if not all(map(is_plain, outs)):
        return _refuse(eqn, num_outputs, "a loop runs over the examples and depends on how many there are", context)
    return [PerExample(0)] * num_outputs


def _while(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    num_cond, num_body = small.params["cond_nconsts"], small.params["body_nconsts"]
    if (num_cond, num_body) != (large.params["cond_nconsts"], large.params["body_nconsts"]):
        raise DifferentPrograms(source_line(small))
    cond_consts, body_consts, carry = ins[:num_cond], ins[num_cond : num_cond + num_body], ins[num_cond + num_body :]

    def body(states: Sequence[AnyState]) -> list[AnyState]:
        return walk(small.params["body_jaxpr"], large.params["body_jaxpr"], [*body_consts, *states], context)

    carry, _ = _fixpoint(small, body, carry, _shapes(small.outvars, large.outvars, context), context)
    [goes_on] = walk(small.params["cond_jaxpr"], large.params["cond_jaxpr"], [*cond_consts, *carry], context)
    if is_plain(goes_on):
        return carry
    return _decided_by_examples(small, goes_on, "how long a loop runs", context)


def _decided_by_examples(eqn: Any, state: AnyState, what: str, context: Context) -> Sequence[Mixed]:
    cause = f" ({state.reason} at {state.where})" if isinstance(state, Mixed) else ""
    return _refuse(eqn, len(eqn.outvars), f"{what} depends on the batch{cause}", context)


def _cond(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    if not is_plain(ins[0]):
        return _decided_by_examples(small, ins[0], "which branch is taken", context)
    branches = zip(small.params["branches"], large.params["branches"], strict=True)
    outs = [walk(a, b, ins[1:], context) for a, b in branches]
    shapes, where = _shapes(small.outvars, large.outvars, context), source_line(small, context.call)
    return [upper_bound(states, s, where) for *states, s in zip(*outs, shapes, strict=True)]


def _custom_derivative(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """The value is the body's. The user's own derivative must keep the examples apart too: its pullback is walked as well."""
    outs = _call(small, large, ins, context)
    lost = all(isinstance(state, Mixed | Sized) for state in outs)
    if lost or not context.derivatives or _derivative_fits(small, large, ins, outs, context):
        return outs
    return _refuse(small, len(outs), "its custom derivative does not keep the examples apart", context)


def _derivative_fits(small: Any, large: Any, ins: Sequence[AnyState], outs: Sequence[AnyState], context: Context) -> bool:
    """Whether the cotangents that come back claim what the gradient of such an operand must."""
    (pull, operands), (large_pull, _) = _pullback(small), _pullback(large)
    states = [next(s for v, s in zip(small.invars, ins, strict=True) if v is operand) for operand in operands]
    incoming = [_cotangent(state, context) for v, state in zip(small.outvars, outs, strict=True) if _is_float(v)]
    found = walk(pull, large_pull, [*states, *incoming], context._replace(derivatives=False))
    wanted = [(v, _cotangent(s, context), s) for v, s in zip(operands, states, strict=True) if _is_float(v)]
    checks = [
        (got, want)
        for got, (_, want, state) in zip(found, wanted, strict=True)
        if isinstance(state, Independent | PerExample | Sum)
    ]
    return all(_satisfies(got, want) for got, want in checks)


def _satisfies(got: AnyState, want: AnyState) -> bool:
    if is_plain(got) and not isinstance(got, Independent):
        return got.small == 0 or want == Sum(1)
    return got == want or (isinstance(got, Independent) and isinstance(want, Sum) and got.ratio == want.ratio)


def _cotangent(state: AnyState, context: Context) -> AnyState:
    """What the gradient of a mean over the batch is to such a value: one N-th per example, else a mean over shards."""
    if isinstance(state, PerExample):
        return PerExample(state.dim, state.outer, 1 / (state.ratio * context.factor))
    if isinstance(state, Independent | Sum):
        return Sum(1 / state.ratio)
    return state if isinstance(state, Mixed) else Sum(1)


def _is_float(variable: Any) -> bool:
    return jax.numpy.issubdtype(variable.aval.dtype, jax.numpy.inexact)


def _pullback(eqn: Any) -> tuple[Any, list[Any]]:
    """The jaxpr of `operands, cotangents -> cotangents` of one equation, floating-point ones only, and the operands."""
    operands = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
    apply = jax_core.jaxpr_as_fun(jax_core.Jaxpr((), operands, eqn.outvars, [eqn], eqn.effects))
    floats = [i for i, v in enumerate(operands) if _is_float(v)]
    kept = [i for i, v in enumerate(eqn.outvars) if _is_float(v)]

    def pull(args: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        def on_floats(*values: Any) -> list[Any]:
            full = list(args)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            outs = apply(*full)
            return [outs[i] for i in kept]

        return jax.vjp(on_floats, *(args[i] for i in floats))[1](list(cotangents))

    specs = [
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in vs] for vs in (operands, [eqn.outvars[i] for i in kept])
    ]
    return jax.make_jaxpr(pull)(*specs), operands


STEPS: dict[str, Step] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"), _call),
    **dict.fromkeys(("composite", "custom_vmap_call", "xla_metadata_call", "compute_on"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_derivative),
    "optimization_barrier": _each,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
