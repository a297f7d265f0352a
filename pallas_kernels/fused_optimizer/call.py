"""What one call of the operation is given and gives, flat as the dispatch wants it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import rounding
from pallas_kernels.fused_optimizer.rules import RULES, Rule


class Given(NamedTuple):
    """Arrays by name."""

    param: Any
    grad: Any
    moments: tuple[Any, ...]
    scales: tuple[Any, ...]  # of each moment, or none
    numbers: tuple[Any, ...]  # those that the program computes, in the order of `names`
    seed: Any


class How(NamedTuple):
    """Options of a call; they are static.

    returns: "updates" or "params". copy: dtype of a second copy of the new parameter, or None. constants: known numbers.
    names: of the others. dim, block: of blocks of moments in 8 bits.
    """

    returns: str
    copy: Any
    constants: tuple[tuple[str, float], ...]
    names: tuple[str, ...]
    dim: int
    block: int

    def given(self, rule: Rule, arrays: Sequence[Any]) -> Given:
        left = iter(arrays)
        param, grad = next(left), next(left)
        moments = tuple(next(left) for _ in range(rule.num_moments))
        scales = tuple(next(left) for _ in moments if moments[0].dtype == jnp.uint8)
        numbers = tuple(next(left) for _ in self.names)
        return Given(param, grad, moments, scales, numbers, next(left, None))

    def numbers(self, found: Sequence[Any]) -> dict[str, Any]:
        return {**dict(self.constants), **dict(zip(self.names, found, strict=True))}

    def value_dtype(self, param: Any) -> Any:
        """Updates are not rounded to a parameter's 16 bits: whoever adds them may round stochastically."""
        return param.dtype if self.returns == "params" else jnp.promote_types(param.dtype, jnp.float32)

    def needs_noise(self, param: Any, moments: Sequence[Any]) -> bool:
        stored = [*(moment.dtype for moment in moments), self.value_dtype(param), self.copy]
        return any(one == jnp.bfloat16 for one in stored if one is not None)


def streams(place: Any, seeds: Sequence[Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """16 bits of noise for each of two moments, for the value and for its copy."""
    halves = []
    for seed in seeds:
        noise = rounding.bits(place, seed)
        halves.append((noise & jnp.uint32(0xFFFF), noise >> jnp.uint32(16)))
    return halves[0], halves[1]


def stored(value: Any, dtype: Any, noise: Any) -> Any:
    """A value in its dtype: bfloat16 is rounded stochastically."""
    return rounding.to_bfloat16(value, noise) if dtype == jnp.bfloat16 else value.astype(dtype)


def seeds_of(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rounding.fold(seed, 0), rounding.fold(seed, 1)


def rule_of(name: str) -> Rule:
    return RULES[name]
