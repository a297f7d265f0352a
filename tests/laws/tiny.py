"""A two-layer network that compiles in a second, as a step for either engine."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jzero

ENGINES = ("composed", "opaque")


def make_params(width=24):
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(0, 1 / np.sqrt(shape[0]), shape), jnp.float32)
    return {"up": draw(width, 48), "bias": jnp.zeros(48), "down": draw(48, width)}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"] - x) ** 2)


def batch(rows=24, width=24):
    return np.random.default_rng(2).normal(size=(rows, width)).astype(np.float32)


def make(engine, *, loss=loss_fn, tx=None, **options):
    """A train step under adamw, and how to make its state of parameters."""
    tx = tx or optax.adamw(1e-2)
    if engine == "composed":
        train_step = jzero.make_train_step(loss, tx, **options)
        return train_step, train_step.init

    def train_step(state, *batch):
        value, grads = jax.value_and_grad(loss)(state["params"], *batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, value

    return train_step, lambda params: {"params": params, "opt_state": tx.init(params)}
