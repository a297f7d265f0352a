"""Whether the examples of a batch meet only in one final sum, so that a gradient may be computed shard by shard.

    verdict = analyze(loss, args, batch_dims)
    is_mean(verdict.outputs[0])     # the mean of the shards' losses is the loss, and so for gradients
    is_sum(verdict.outputs[0])      # ... their sum
    explain_mixed(verdict.outputs[0])  # else: where the examples meet, and in what

The function is traced at two batch sizes and both programs are walked in lockstep. A dim that differs between them is the
batch's; a literal that differs tells a mean's divisor from a weight. Only shapes are looked at. What is not known to keep
the examples apart is `Mixed`: a wrong guess in that direction costs speed, in the other the meaning of the loss.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jzero.reduction.control import STEPS
from jzero.reduction.programs import DIFFERENT, Context, DifferentPrograms, enlarged, trace
from jzero.reduction.states import INDEPENDENT as INDEPENDENT
from jzero.reduction.states import ONE, AnyState, Mixing, Shapes, settle
from jzero.reduction.states import Independent as Independent
from jzero.reduction.states import Mixed as Mixed
from jzero.reduction.states import PerExample as PerExample
from jzero.reduction.states import State as State
from jzero.reduction.states import Sum as Sum
from jzero.reduction.walk import walk


class Verdict(NamedTuple):
    """The state of every output, and one line of text for every place where examples meet."""

    outputs: tuple[State, ...]
    findings: tuple[str, ...]
    program: Any = None  # the jaxpr at the batch size of the arguments


def analyze(
    fn: Callable[..., Sequence[Any]], args: Sequence[Any], batch_dims: Sequence[int | None], *, factor: int = 2
) -> Verdict:
    """Follow the examples through `fn(*args)`, a function of flat arrays to a flat list of arrays.

    Args:
      fn: any traceable function. It is traced at the batch size of `args` and at `factor` times that.
      args: shapes and dtypes (`ShapeDtypeStruct` or arrays); none is computed with.
      batch_dims: per arg the dim that holds examples, or None (parameters, keys, model state).
      factor: how many shards the larger batch has. With `args` at one shard's size and `factor` the number of shards, the
        verdict is about exactly the two programs that will be compared (a size of one is judged as two would be); otherwise it
        assumes that a divisor which doubles with the batch goes on doing so.

    Returns:
      A `Verdict`. `Sum.ratio` is `factor` for a sum and 1 for a mean. Random draws shaped by the batch count as per-example.

    Not followed, and so mixed: loops over the batch that carry something, shard_map, pallas and foreign calls, callbacks
    that return values, mutable references, batches merged with other dims in an order that no reshape undoes.
    """
    small = trace(fn, args)
    try:
        large = trace(fn, enlarged(args, batch_dims, factor))
    except Exception as error:  # whatever the user's code raises at a batch size that it was not written for
        first_line = str(error).partition("\n")[0]
        return _nothing_known(f"the loss cannot be traced at {factor} times the batch size: {first_line}", "", small)
    sizes = [arg.shape[dim] for arg, dim in zip(args, batch_dims, strict=True) if dim is not None]
    context = Context(math.gcd(*sizes) or 1, factor, STEPS)
    try:
        return _verdict(small, large, batch_dims, context)
    except DifferentPrograms as difference:
        if context.batch > 1 or not sizes:
            return _nothing_known(DIFFERENT, str(difference), small)
    # jax.numpy takes other paths for dims of size one, so a local batch of one is judged as two would be
    return analyze(fn, enlarged(args, batch_dims, 2), batch_dims, factor=factor)


def _verdict(small: Any, large: Any, batch_dims: Sequence[int | None], context: Context) -> Verdict:
    ins = [INDEPENDENT if dim is None else PerExample(dim) for dim in batch_dims]
    states = walk(small, large, ins, context)
    shapes = [context.shapes(a, b) for a, b in zip(small.outvars, large.outvars, strict=True)]
    outputs = tuple(map(_public, states, shapes))
    findings = dict.fromkeys(f"{s.where}: {s.reason}" for s in outputs if isinstance(s, Mixed))
    return Verdict(outputs, tuple(findings), small)


def _nothing_known(reason: str, where: str, small: Any) -> Verdict:
    mixed = Mixed(reason, where or "an unknown line")
    return Verdict((mixed,) * len(small.outvars), (f"{mixed.where}: {reason}",), small)


def _public(state: AnyState, shapes: Shapes) -> State:
    """The four states that callers know."""
    try:
        claim = state if isinstance(state, Mixed) else settle(state, shapes)
    except Mixing as mixing:
        return Mixed(str(mixing), "the output")
    if isinstance(claim, Independent):
        return claim if claim == INDEPENDENT else Sum(claim.ratio)
    if isinstance(claim, PerExample) and claim != PerExample(claim.dim):
        return Mixed("a per-example output is scaled by the batch size, or its examples are not contiguous", "the output")
    return claim


def is_independent(state: State) -> bool:
    """Whether every shard has the value of the whole batch."""
    return state == INDEPENDENT


def is_per_example(state: State, dim: int) -> bool:
    """Whether the shards' values, concatenated along `dim`, are the value for the whole batch."""
    return state == PerExample(dim)


def is_mean(state: State) -> bool:
    """Whether the mean of the shards' values is the value for the whole batch."""
    return state in (INDEPENDENT, Sum(ONE))


def is_sum(state: State, *, factor: int = 2) -> bool:
    """Whether the sum of the shards' values is the value for the whole batch. `factor`: as given to `analyze`."""
    return state == Sum(Fraction(factor))


def explain_mixed(state: State) -> str:
    """Why a state is neither a mean nor a sum: the line where examples meet, the primitive and the reason."""
    if isinstance(state, Mixed):
        return f"examples meet at {state.where}: {state.reason}"
    if isinstance(state, Sum):
        return f"a sum over examples that grows with the batch size by another factor than a sum or a mean ({state.ratio})"
    return f"one value per example, along dim {state.dim}" if isinstance(state, PerExample) else "independent of the batch"
