"""Whole train steps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optax import contrib

from programs.table import BIAS, D, H, V, W, mlp, normal, step


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    return {name: normal(rng, shape) for name, shape in (shapes or {"w": W, "v": V, "b": BIAS}).items()}


def regression(p: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((mlp(p, x) + p["b"] - jnp.cos(x)) ** 2)


def trained_by(tx: Any) -> tuple[Any, Callable[..., Any]]:
    def train_step(state, x, t):
        params, opt_state = state
        value, grads = jax.value_and_grad(regression)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = weights()
    return (params, tx.init(params)), train_step


NORMALISING = ("adafactor", "masked", "muon")  # optimizers that turn rounding of a small gradient into a large difference


@step
def adafactor():
    return trained_by(optax.adafactor(1e-2, min_dim_size_to_factor=8))


@step
def masked():
    return trained_by(optax.masked(optax.adam(1e-2), {"w": True, "v": False, "b": True}))


@step
def muon():
    return trained_by(contrib.muon(1e-2))


@step
def clipped_and_averaged():
    return trained_by(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9), optax.ema(0.9)))


SGD = optax.sgd(0.1, momentum=0.9)


def sgd(state, x):
    params, opt_state = state
    value, grads = jax.value_and_grad(regression)(params, x)
    updates, opt_state = SGD.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def sgd_state():
    params = weights()
    return params, SGD.init(params)


@step
def several_steps_in_a_fori_loop():
    def train_step(state, x, t):
        return lax.fori_loop(0, 3, lambda i, state: sgd(state, x * (1 + i))[0], state), None

    return sgd_state(), train_step


@step
def several_steps_in_a_scan():
    def train_step(state, x, t):
        return lax.scan(sgd, state, jnp.stack([x, 2 * x, x + 1]))

    return sgd_state(), train_step


@step
def steps_until_small():
    def train_step(state, x, t):
        def body(carry):
            state, _, num_steps = carry
            return *sgd(state, x), num_steps + 1

        go_on = lambda carry: (carry[1] > 0.1) & (carry[2] < 4) & (jnp.abs(carry[0][0]["w"]).max() < 100)
        state, value, _ = lax.while_loop(go_on, body, (state, jnp.inf, 0))
        return state, value

    return sgd_state(), train_step


@step
def own_accumulation():
    def train_step(state, x, t):
        params, opt_state = state

        def body(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(regression)(params, x)), None

        grads, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), x.reshape(-1, 2, D).swapaxes(0, 1))
        updates, opt_state = SGD.update(jax.tree.map(lambda g: g / 2, grads), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(grads)

    return sgd_state(), train_step


@step
def update_under_cond():
    def train_step(state, x, t):
        after, value = sgd(state, x)
        return lax.cond(jnp.isfinite(value), lambda: after, lambda: state), value

    return sgd_state(), train_step


@step
def step_inside_jit():
    inner = jax.jit(sgd, donate_argnums=0)
    return sgd_state(), lambda state, x, t: inner(state, x)


@step
def update_under_vmap():
    """An ensemble: the members' parameters are stacked, and so are their updates."""
    params = weights(w=(4, *W), v=(4, *V), b=(4, *BIAS))
    return (params, SGD.init(params)), lambda state, x, t: jax.vmap(sgd, in_axes=(0, None))(state, x)


@step
def moving_average_and_counters():
    def train_step(state, x, t):
        key, noise = jax.random.split(state["key"])
        params = jax.tree.map(lambda leaf: leaf + 1e-3 * jax.random.normal(noise, leaf.shape), state["params"])
        (params, opt_state), value = sgd((params, state["opt_state"]), x)
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["ema"], params)
        seen = state["seen"].at[t.reshape(-1)].add(1)
        after = {"params": params, "opt_state": opt_state, "ema": ema, "seen": seen, "step": state["step"] + 1, "key": key}
        return after, value

    params, opt_state = sgd_state()
    others = {"seen": jnp.zeros(H, jnp.int32), "step": 0, "key": jax.random.key(0)}
    return {"params": params, "opt_state": opt_state, "ema": params, **others}, train_step


@step
def one_array_twice():
    """A target network that starts as the very arrays of the parameters."""

    def train_step(state, x, t):
        (params, opt_state), value = sgd((state["params"], state["opt_state"]), x + mlp(state["target"], x))
        target = optax.incremental_update(params, state["target"], 0.01)
        return {"params": params, "opt_state": opt_state, "target": target}, value

    params, opt_state = sgd_state()
    return {"params": params, "opt_state": opt_state, "target": params}, train_step


class Mlp(eqx.Module):
    w: jax.Array
    v: jax.Array
    activation: Callable[..., Any]

    def __call__(self, x):
        return self.activation(x @ self.w) @ self.v


@step
def callable_leaf_in_the_state():
    def train_step(state, x, t):
        model, opt_state = state
        value, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(x) - x) ** 2))(model)
        updates, opt_state = SGD.update(grads, opt_state)
        return (eqx.apply_updates(model, updates), opt_state), value

    model = Mlp(**weights(w=W, v=V), activation=jnp.tanh)
    return (model, SGD.init(eqx.filter(model, eqx.is_inexact_array))), train_step


@step
def sharpness_aware():
    """Two gradients a step, the second at parameters moved by the first (SAM)."""

    def train_step(state, x, t):
        params, opt_state = state
        grads = jax.grad(regression)(params, x)
        scale = 0.05 / optax.tree.norm(grads)
        moved = jax.tree.map(lambda leaf, grad: leaf + scale * grad, params, grads)
        value, grads = jax.value_and_grad(regression)(moved, x)
        updates, opt_state = SGD.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return sgd_state(), train_step


@step
def hessian_vector_product():
    def train_step(state, x, t):
        params, opt_state = state
        value, grads = jax.value_and_grad(regression)(params, x)
        _, curved = jax.jvp(lambda params: jax.grad(regression)(params, x), (params,), (grads,))
        updates, opt_state = SGD.update(curved, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return sgd_state(), train_step
