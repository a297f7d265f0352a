"""AdamW and Lion, element by element, in float32: what the reference and both kernels run.

g is the gradient times `factor` (what unscales and clips it), t the number of the update, from 1.

    AdamW   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
            update = -rate ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps) + decay p)
    Lion    update = -rate (sign(b1 m + (1 - b1) g) + decay p),   m = b2 m + (1 - b2) g

Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019. Chen et al.: Symbolic Discovery of Optimization Algorithms,
2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Rule(NamedTuple):
    """`step(g, p, moments, numbers) -> (update, moments)`; formats of its moments in 8 bits."""

    step: Any
    formats: tuple[str, ...]  # one for each moment

    @property
    def num_moments(self) -> int:
        return len(self.formats)


def _adamw(g: Any, p: Any, moments: Sequence[Any], n: Mapping[str, Any]) -> Any:
    m, v = moments
    g = g * n["factor"]
    m = (1 - n["b1"]) * g + n["b1"] * m
    v = (1 - n["b2"]) * (g * g) + n["b2"] * v
    direction = (m / n["correction1"]) / (jnp.sqrt(v / n["correction2"] + n["eps_root"]) + n["eps"])
    return -n["rate"] * (direction + n["decay"] * p), (m, v)


def _lion(g: Any, p: Any, moments: Sequence[Any], n: Mapping[str, Any]) -> Any:
    (m,) = moments
    g = g * n["factor"]
    between = (1 - n["b1"]) * g + n["b1"] * m
    direction = jnp.where(between > 0, 1.0, jnp.where(between < 0, -1.0, between))  # TPU kernels have no sign; NaN stays
    return -n["rate"] * (direction + n["decay"] * p), ((1 - n["b2"]) * g + n["b2"] * m,)


RULES = {"adamw": Rule(_adamw, ("dynamic", "dynamic_unsigned")), "lion": Rule(_lion, ("dynamic",))}
