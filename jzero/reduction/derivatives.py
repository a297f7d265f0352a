"""The user's own derivatives: what goes backwards through a custom rule, and what a gradient that comes back must claim."""

from collections.abc import Sequence
from typing import Any

import jax

from jzero.reduction.programs import Context, is_literal
from jzero.reduction.states import INDEPENDENT, ONE, AnyState, Constant, Independent, Mixed, PerExample, Sum


def satisfies(got: AnyState, want: AnyState) -> bool:
    if isinstance(got, Constant):
        return got.small == got.large and (got.small == 0 or want in (Sum(ONE), INDEPENDENT))
    return got == want or (isinstance(got, Independent) and isinstance(want, Sum) and got.ratio == want.ratio)


def cotangent(state: AnyState, context: Context) -> AnyState:
    """What the gradient of a mean over the batch is to such a value: one N-th per example, else a mean over shards.

    After a sum only factors follow that are the same in every shard, or the loss would be mixed: so is the sum's cotangent.
    """
    if isinstance(state, PerExample):
        return PerExample(state.dim, state.outer, 1 / (state.ratio * context.factor))
    if isinstance(state, Sum):
        return Independent(1 / state.ratio)
    if isinstance(state, Independent):
        return Sum(1 / state.ratio)
    return state if isinstance(state, Mixed) else Sum(ONE)


def is_float(variable: Any) -> bool:
    return jax.numpy.issubdtype(variable.aval.dtype, jax.numpy.inexact)


def pullback(eqn: Any) -> tuple[Any, list[Any]]:
    """The jaxpr of `operands, cotangents -> cotangents` of one equation, floating-point ones only, and the operands."""
    operands = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
    floats = [i for i, v in enumerate(operands) if is_float(v)]
    kept = [i for i, v in enumerate(eqn.outvars) if is_float(v)]

    def pull(args: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        def on_floats(*values: Any) -> list[Any]:
            full = list(args)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            known = dict(zip(operands, full, strict=True))
            outs = bind(eqn, [v.val if is_literal(v) else known[v] for v in eqn.invars])
            return [outs[i] for i in kept]

        return jax.vjp(on_floats, *(args[i] for i in floats))[1](list(cotangents))

    specs = [
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in vs] for vs in (operands, [eqn.outvars[i] for i in kept])
    ]
    return jax.make_jaxpr(pull)(*specs), operands


# moves to _compat
def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Run one equation on new arguments: jax 0.11 and later give `get_bind_params` one result or two."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outs = eqn.primitive.bind(*functions, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]
