"""flax nnx: a module, an `nnx.Optimizer`, and the one line. The state is what `nnx.split` makes of the two together.

    python examples/nnx.py

On a machine without accelerators it trains on eight simulated devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens

from itertools import islice

import jax
import optax
from flax import nnx

import jzero
from jzero.data import batches, english


class NextByte(nnx.Module):
    """Sixteen bytes of English predict the next one."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 64, rngs=rngs)
        self.hidden = nnx.Linear(16 * 64, 512, rngs=rngs)
        self.out = nnx.Linear(512, 256, rngs=rngs)

    def __call__(self, context):
        x = self.embed(context).reshape(len(context), -1)
        return self.out(nnx.gelu(self.hidden(x)))


def loss_fn(model, window):
    return optax.softmax_cross_entropy_with_integer_labels(model(window[:, :-1]), window[:, -1]).mean()


def make_state(key):
    model = NextByte(nnx.Rngs(key))
    return nnx.split((model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)))


def train_step(state, window):
    model, optimizer = nnx.merge(*state)
    loss, grads = nnx.value_and_grad(loss_fn)(model, window)
    optimizer.update(model, grads)
    return nnx.split((model, optimizer)), loss


def train(step, state):
    for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
        state, loss = step(state, window)
        print(f"{float(loss):.4f}", end=" ", flush=True)
    print()
    return state, window, loss


print("one device, plain flax:")
alone, _, loss_alone = train(jax.jit(train_step), make_state(jax.random.key(0)))

step = jzero.shard(train_step, stage=3)  # the one line
print(f"{jax.device_count()} devices, stage 3:")
state, window, loss = train(step, step.init(make_state, jax.random.key(0)))

resting = step.report(state, window).to_dict()["bytes_at_rest"]
each_mb = sum(resting[role]["measured"] for role in ("params", "opt_state", "other")) / 1e6
whole_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(alone)) / 1e6
print(f"state per device: {each_mb:.2f} MB instead of {whole_mb:.2f} MB")
assert abs(float(loss) - float(loss_alone)) < 1e-4 * float(loss_alone)

model, _ = nnx.merge(*state)  # an ordinary nnx module again, its parameters sharded
print(f"{model.hidden.kernel[...].sharding.spec = }")
