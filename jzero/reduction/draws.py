"""Rules of random draws: one whose shape holds the batch is a draw for each example.

Under a local batch every shard draws its own numbers. The engine folds the shard's index into the key, so that the draws
differ between shards as they do between examples: not the same numbers as on one device, but the same distribution.
A draw without a batch dim is shared by the examples of a shard instead of the whole batch.
"""

from jzero.reduction.equation import Equation, Rule
from jzero.reduction.states import INDEPENDENT, AnyState, Mixing, PerExample, is_plain, settle, spread


def draw(eq: Equation) -> AnyState:
    keys = settle(eq.ins[0], eq.in_shapes[0]) if eq.ins else INDEPENDENT
    if isinstance(keys, PerExample) and eq.params["shape"] == eq.large_params["shape"]:
        return keys
    if keys != INDEPENDENT:
        raise Mixing("a random draw by a key that depends on the examples")
    return spread(INDEPENDENT, eq.out)


def generator(eq: Equation) -> list[AnyState]:
    if not is_plain(eq.ins[0]):
        raise Mixing("a random draw by a key that depends on the examples")
    return [INDEPENDENT, spread(INDEPENDENT, eq.out_shapes[1])]


def uniform(eq: Equation) -> AnyState:
    if not all(map(is_plain, eq.ins)):
        raise Mixing("a random draw with bounds that depend on the examples")
    return spread(INDEPENDENT, eq.out)


RULES = {
    "random_bits": Rule(draw, varies=("shape",), spreads=True),
    "random_split": Rule(draw, varies=("shape",), spreads=True),
    "rng_bit_generator": Rule(generator, varies=("shape",), spreads=True),
    "rng_uniform": Rule(uniform, varies=("shape",), spreads=True),
}
