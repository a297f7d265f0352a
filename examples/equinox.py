"""equinox: a module that is a pytree, and the one line. Leaves that are no arrays are split off, as `eqx.partition` does.

    python examples/equinox.py

On a machine without accelerators it trains on eight simulated devices.
"""

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens
sys.path = [
    folder for folder in sys.path if not folder.endswith("examples")
]  # or this file hides the library it is named after

from itertools import islice

import equinox as eqx
import jax
import optax

import jzero
from jzero.data import batches, english

optimizer = optax.adamw(1e-3)


class NextByte(eqx.Module):
    """Sixteen bytes of English predict the next one."""

    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key):
        embed_key, mlp_key = jax.random.split(key)
        self.embed = eqx.nn.Embedding(256, 64, key=embed_key)
        self.mlp = eqx.nn.MLP(16 * 64, 256, width_size=512, depth=1, activation=jax.nn.gelu, key=mlp_key)

    def __call__(self, context):
        return self.mlp(jax.vmap(self.embed)(context).reshape(-1))


def loss_fn(model, window):
    logits = jax.vmap(model)(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, -1]).mean()


def make_state(key):
    model = NextByte(key)
    return model, optimizer.init(eqx.filter(model, eqx.is_array))


def train_step(state, window):
    model, opt_state = state
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, window)
    updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
    return (eqx.apply_updates(model, updates), opt_state), loss


def train(step, state):
    for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
        state, loss = step(state, window)
        print(f"{float(loss):.4f}", end=" ", flush=True)
    print()
    return state, window, loss


print("one device, plain equinox:")
alone, _, loss_alone = train(eqx.filter_jit(train_step), make_state(jax.random.key(0)))

step = jzero.shard(train_step, stage=3)  # the one line
print(f"{jax.device_count()} devices, stage 3:")
state, window, loss = train(step, step.init(make_state, jax.random.key(0)))

resting = step.report(state, window).to_dict()["bytes_at_rest"]
each_mb = sum(resting[role]["measured"] for role in ("params", "opt_state", "other")) / 1e6
whole_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(alone, eqx.is_array))) / 1e6
print(f"state per device: {each_mb:.2f} MB instead of {whole_mb:.2f} MB")
assert abs(float(loss) - float(loss_alone)) < 1e-4 * float(loss_alone)
