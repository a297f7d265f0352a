"""A train step that jzero did not write: a small network, its gradient and whatever optax optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import OPTIMIZERS

WIDTH, CLASSES, ROWS = 24, 48, 96
MIN_SHARD_ELEMENTS = 48  # the biases of `up` and `out` shard, `shift` does not


def make_params():
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(0, 1 / np.sqrt(shape[0]), shape), jnp.float32)
    return {
        "up": {"kernel": draw(WIDTH, 4 * WIDTH), "bias": draw(4 * WIDTH)},
        "out": {"kernel": draw(4 * WIDTH, CLASSES), "bias": draw(CLASSES)},
        "shift": draw(WIDTH),  # moves all logits of an example alike, as a key bias does: its true gradient is zero
    }


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"] + (x @ params["shift"])[:, None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(optimizer, accumulate=1):
    tx = OPTIMIZERS[optimizer]()

    def gradient(params, x, y):
        if accumulate == 1:
            return jax.value_and_grad(loss_fn)(params, x, y)
        micro = (x.reshape(accumulate, -1, WIDTH), y.reshape(accumulate, -1))
        parts = jax.lax.map(lambda rows: jax.value_and_grad(loss_fn)(params, *rows), micro)
        return jax.tree.map(lambda leaf: leaf.mean(0), parts)

    def train_step(state, x, y):
        params, opt_state = state
        loss, grads = gradient(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return train_step


def initial(optimizer):
    params = make_params()
    return params, OPTIMIZERS[optimizer]().init(params)


def batch(order=slice(None)):
    random = np.random.default_rng(2)
    x, y = random.normal(size=(ROWS, WIDTH)).astype(np.float32), random.integers(0, CLASSES, ROWS, np.int32)
    return x[order], y[order]
