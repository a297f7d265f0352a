"""flax linen: a module, a `TrainState`, its `apply_gradients`, and the one line.

    python examples/linen.py

On a machine without accelerators it trains on eight simulated devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens

from itertools import islice

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jzero
from jzero.data import batches, english


class NextByte(nn.Module):
    """Sixteen bytes of English predict the next one."""

    @nn.compact
    def __call__(self, context):
        x = nn.Embed(256, 64)(context).reshape(len(context), -1)
        return nn.Dense(256)(nn.gelu(nn.Dense(512)(x)))


model = NextByte()


def make_state(key, window):
    params = model.init(key, window[:, :-1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3))


def train_step(state, window):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, -1]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(step, state):
    for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
        state, loss = step(state, window)
        print(f"{float(loss):.4f}", end=" ", flush=True)
    print()
    return state, window, loss


window = next(batches(english(), batch=64, seq=16, vocab_size=256))
print("one device, plain flax:")
alone, _, loss_alone = train(jax.jit(train_step), make_state(jax.random.key(0), window))

step = jzero.shard(train_step, stage=3)  # the one line
print(f"{jax.device_count()} devices, stage 3:")
state, window, loss = train(step, step.init(make_state, jax.random.key(0), window))

resting = step.report(state, window).to_dict()["bytes_at_rest"]
each_mb = sum(resting[role]["measured"] for role in ("params", "opt_state", "other")) / 1e6
whole_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(alone)) / 1e6
print(f"state per device: {each_mb:.2f} MB instead of {whole_mb:.2f} MB")
assert abs(float(loss) - float(loss_alone)) < 1e-4 * float(loss_alone)
