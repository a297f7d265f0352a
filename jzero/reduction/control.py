"""The walk into bodies: calls, loops, branches and custom derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

from jzero.reduction import moves
from jzero.reduction.derivatives import cotangent, is_float, pullback, satisfies
from jzero.reduction.programs import Context, DifferentPrograms, inner, open_jaxpr, scan_counts, source_line
from jzero.reduction.states import (
    INDEPENDENT,
    AnyState,
    Claim,
    Mixed,
    PerExample,
    Shapes,
    Sized,
    first,
    is_plain,
    upper_bound,
)
from jzero.reduction.walk import refuse, walk

Step = Callable[[Any, Any, Sequence[AnyState], Context], Sequence[AnyState]]


def _call(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """`jit`, `remat` and the like: the body is the meaning."""
    a, b = inner(small.params), inner(large.params)
    if a is None or b is None or len(open_jaxpr(a)[0].invars) != len(ins):
        return refuse(small, len(small.outvars), "a call whose body cannot be read", context)
    if small.primitive.name in ("jit", "pjit"):
        context = context._replace(call=(small.params["name"], source_line(small, context.call)))
    return walk(a, b, ins, context)


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
    slices = [moves.renamed(state, lambda dim: dim - 1) for state in xs]

    def body(states: Sequence[AnyState]) -> list[AnyState]:
        return walk(*bodies, [*consts, *states, *slices], context)

    carry, outs = _fixpoint(small, body, carry, _shapes(small.outvars, large.outvars, context)[:num_carry], context)
    return [*carry, *(moves.renamed(state, lambda dim: dim + 1) for state in outs[num_carry:])]


def _shapes(smalls: Sequence[Any], larges: Sequence[Any], context: Context) -> list[Shapes]:
    return [context.shapes(a, b) for a, b in zip(smalls, larges, strict=True)]


def _fixpoint(eqn: Any, body: Callable, carry: Sequence[AnyState], shapes: Sequence[Shapes], context: Context) -> tuple:
    """Carry states that one more iteration does not change, and the body's outputs under them."""
    where = source_line(eqn, context.call)
    for _ in range(4 * len(carry) + 2):  # each carry can climb constant, independent, sum, mixed
        outs = body(carry)
        after = [upper_bound(pair, s, where) for *pair, s in zip(carry, outs[: len(carry)], shapes, strict=True)]
        if after == list(carry):
            return after, outs
        carry = after
    carry = refuse(eqn, len(carry), "the states of a loop do not settle", context)
    return carry, body(carry)


def _over_examples(
    eqn: Any, bodies: tuple[Any, Any], consts: Sequence, carry: Sequence, xs: Sequence, context: Context
) -> Sequence[AnyState]:
    """A map: one example's slice is to its own iteration what a parameter is to the program."""
    num_outputs = len(eqn.outvars)
    if carry:
        return refuse(eqn, num_outputs, "a loop runs over the examples and carries values from one to the next", context)
    if mixed := first(Mixed, [*consts, *xs]):
        return [mixed] * num_outputs
    if not all(map(is_plain, consts)) or not all(x == PerExample(0) or is_plain(x) for x in xs):
        return refuse(eqn, num_outputs, "a loop runs over the examples with values that depend on the others", context)
    outs = walk(*bodies, [*consts, *(INDEPENDENT if x == PerExample(0) else x for x in xs)], context)
    if not all(map(is_plain, outs)):
        return refuse(eqn, num_outputs, "a loop runs over the examples and depends on how many there are", context)
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
    return refuse(eqn, len(eqn.outvars), f"{what} depends on the batch{cause}", context)


def _cond(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    if not is_plain(ins[0]):
        return _decided_by_examples(small, ins[0], "which branch is taken", context)
    smalls, larges = small.params["branches"], large.params["branches"]
    if len(smalls) != len(larges):
        raise DifferentPrograms(source_line(small))
    outs = [walk(a, b, ins[1:], context) for a, b in zip(smalls, larges, strict=True)]
    shapes, where = _shapes(small.outvars, large.outvars, context), source_line(small, context.call)
    return [upper_bound(states, s, where) for *states, s in zip(*outs, shapes, strict=True)]


def _custom_derivative(small: Any, large: Any, ins: Sequence[AnyState], context: Context) -> Sequence[AnyState]:
    """The value is the body's. The user's own derivative must keep the examples apart too: its pullback is walked as well."""
    outs = _call(small, large, ins, context)
    if not context.derivatives or all(isinstance(state, Mixed | Sized) for state in outs):
        return outs
    try:
        if _derivative_fits(small, large, ins, outs, context):
            return outs
    except Exception as error:  # the user's own rule, called with shapes alone
        return refuse(small, len(outs), f"its custom derivative cannot be traced: {error}", context)
    return refuse(small, len(outs), "its custom derivative does not keep the examples apart", context)


def _derivative_fits(small: Any, large: Any, ins: Sequence[AnyState], outs: Sequence[AnyState], context: Context) -> bool:
    """Whether the cotangents that come back claim what the gradient of such an operand must."""
    (pull, operands), (large_pull, _) = pullback(small), pullback(large)
    states = [next(s for v, s in zip(small.invars, ins, strict=True) if v is operand) for operand in operands]
    incoming = [cotangent(state, context) for v, state in zip(small.outvars, outs, strict=True) if is_float(v)]
    found = walk(pull, large_pull, [*states, *incoming], context._replace(derivatives=False))
    wanted = [(cotangent(state, context), state) for v, state in zip(operands, states, strict=True) if is_float(v)]
    checked = [(got, want) for got, (want, state) in zip(found, wanted, strict=True) if isinstance(state, Claim)]
    return all(satisfies(got, want) for got, want in checked)


STEPS: dict[str, Step] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"), _call),
    **dict.fromkeys(("composite", "custom_vmap_call", "xla_metadata_call", "compute_on"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_derivative),
    **dict.fromkeys(("optimization_barrier", "device_put"), _each),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
