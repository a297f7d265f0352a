"""Plain JAX: a dict of arrays, an optax optimizer, a loop. Then the one line, and the same with jzero's own train step.

    python examples/dict.py

On a machine without accelerators it trains on eight simulated devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens

from itertools import islice

import jax
import optax

import jzero
from jzero.data import batches, english

optimizer = optax.adamw(1e-3)


def make_params(key):
    shapes = {"embed": (256, 64), "hidden": (16 * 64, 512), "out": (512, 256)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shapes[name]) / shapes[name][0] ** 0.5 for k, name in zip(keys, shapes, strict=True)}


def loss_fn(params, window):
    """Sixteen bytes of English predict the next one. window[64, 17]"""
    x = params["embed"][window[:, :-1]].reshape(len(window), -1)
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, -1]).mean()


def make_state(key):
    params = make_params(key)
    return {"params": params, "opt_state": optimizer.init(params)}


def train_step(state, window):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], window)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss


def train(step, state):
    for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
        state, loss = step(state, window)
        print(f"{float(loss):.4f}", end=" ", flush=True)
    print()
    return state, window, loss


print("one device, plain JAX:")
alone, _, loss_alone = train(jax.jit(train_step), make_state(jax.random.key(0)))

step = jzero.shard(train_step, stage=3)  # the one line
print(f"{jax.device_count()} devices, stage 3:")
state, window, loss = train(step, step.init(make_state, jax.random.key(0)))

resting = step.report(state, window).to_dict()["bytes_at_rest"]
each_mb = sum(resting[role]["measured"] for role in ("params", "opt_state", "other")) / 1e6
whole_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(alone)) / 1e6
print(f"state per device: {each_mb:.2f} MB instead of {whole_mb:.2f} MB")
assert abs(float(loss) - float(loss_alone)) < 1e-4 * float(loss_alone)

# jzero can own the update too: it then accumulates, clips and scales, and reduces each gradient just when the stage says.
owned = jzero.make_train_step(loss_fn, optimizer, accumulate=2, clip_norm=1.0)
step = jzero.shard(owned, stage=2)
print(f"{jax.device_count()} devices, stage 2, make_train_step with two microbatches:")
state = step.init(owned.init, make_params, jax.random.key(0))
for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
    state, metrics = step(state, window)
    print(f"{float(metrics['loss']):.4f}", end=" ", flush=True)
print()
assert abs(float(metrics["loss"]) - float(loss_alone)) < 0.1 * float(loss_alone)  # clipped, so near and not equal
