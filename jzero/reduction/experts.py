"""Rules of jzero's own operations: a statistic averaged over the batch, and tokens on their way to experts and back.

Tokens that were sent to experts lie in another order than they came; what is done to each by itself stays with it, and
`jzero.moe` has nothing else done to them, so they count as per-example until they are back.
"""

from collections.abc import Sequence
from fractions import Fraction

from jzero.reduction.equation import Equation, Rule, settled
from jzero.reduction.states import AnyState, Claim, Independent, Mixing, PerExample, Sum, is_plain

APART = "tokens are routed in a way that does not keep the examples apart"


def over_batch_mean(eq: Equation) -> list[Claim]:
    """Where shards compute on their own it is their mean: for the mean of the shards' means the same in every shard."""

    def averaged(claim: Claim) -> Claim:
        if isinstance(claim, PerExample):
            raise Mixing("one value per example is averaged over the batch: average over the examples first")
        return Independent(claim.ratio)

    return [averaged(claim) for claim in settled(eq)]


def dispatch(eq: Equation) -> list[AnyState]:
    """`x[B, T, D], ids[B, T, K]` -> rows, where each choice went, and without a capacity how many rows an expert has."""
    if not all(state == PerExample(0) for state in eq.ins):
        raise Mixing(APART)
    rows = PerExample(0 if eq.params["capacity"] is None else 1)
    outs: Sequence[AnyState] = (rows, PerExample(0), Sum(Fraction(eq.out.factor)))
    return list(outs[: len(eq.out_shapes)])


def product(eq: Equation) -> AnyState:
    """Rows times the weights of their expert; how many rows an expert has is the batch's, and says only where they lie."""
    rows, weights, *_ = settled(eq)
    if not isinstance(rows, PerExample) or rows.ratio != 1 or not is_plain(weights):
        raise Mixing(APART)
    return rows


def combine(eq: Equation) -> AnyState:
    """Rows back to their tokens, weighted by the router."""
    rows, where, gates, *_ = settled(eq)
    if not (isinstance(rows, PerExample) and rows.ratio == 1 and where == gates == PerExample(0)):
        raise Mixing(APART)
    return PerExample(0)


RULES = {
    "jzero_over_batch_mean": Rule(over_batch_mean),
    "jzero_expert_dispatch": Rule(dispatch),
    "jzero_expert_product": Rule(product),
    "jzero_expert_combine": Rule(combine),
}
