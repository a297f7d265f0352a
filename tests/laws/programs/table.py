"""The table of programs: how a loss or a train step enters it, and what they have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

D, H, T, L, B = 24, 48, 6, 3, 24  # width, hidden width and vocabulary, length, layers, batch
W, V, SQUARE, BIAS, EMBED = (D, H), (H, D), (D, D), (D,), (H, D)
STACK = (L, D, D)


class Loss(NamedTuple):
    """A loss `fn(params, x, t)`; with `on_mesh` also `mesh=`."""

    fn: Callable[..., Any]
    leaves: dict[str, Any]  # name -> shape, or a function that makes the leaf
    meets: bool = False
    local: bool = False  # although the analysis cannot tell, it is a mean over examples
    on_mesh: bool = False
    tensor: int = 1  # size of a tensor axis beside data
    trains: Any = None  # path -> bool: not differentiated, so for jzero's own step only
    opaque: bool = True
    exact: Callable[..., Any] | None = None  # the same in float32, for a loss that computes in 16 bits

    def params(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {name: make(rng) if callable(make) else normal(rng, make) for name, make in self.leaves.items()}


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(max(1, *shape[-1:])), jnp.float32)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Features `x[B, D]` and tokens `t[B, T]`."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(B, D)).astype(np.float32), rng.integers(0, H, (B, T), dtype=np.int32)


LOSSES: dict[str, Loss] = {}
STEPS: dict[str, Callable[[], tuple[Any, Callable[..., Any]]]] = {}


def loss(*, meets=False, local=False, on_mesh=False, tensor=1, trains=None, opaque=True, exact=None, **leaves):
    """Enters a function into `LOSSES`, with the shapes of the parameters that it takes."""

    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        LOSSES[fn.__name__] = Loss(fn, leaves, meets, local, on_mesh, tensor, trains, opaque, exact)
        return fn

    return enter


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["v"]


def step(make: Callable[[], tuple[Any, Callable[..., Any]]]) -> Callable[[], tuple[Any, Callable[..., Any]]]:
    """Enters a function that makes `(state, train step)` into `STEPS`."""
    STEPS[make.__name__] = make
    return make
