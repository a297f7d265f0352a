"""Training what does not fit: the optimizer's moments rest in host memory and come to the device a bucket at a time.

    python examples/offload.py

On a machine without accelerators it trains on eight simulated devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens

from itertools import islice

import jax
import optax

import jzero
from jzero.data import batches, english


def make_params(key):
    shapes = {"embed": (256, 64), "hidden": (16 * 64, 512), "out": (512, 256)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shapes[name]) / shapes[name][0] ** 0.5 for k, name in zip(keys, shapes, strict=True)}


def loss_fn(params, window):
    """Sixteen bytes of English predict the next one. window[64, 17]"""
    x = params["embed"][window[:, :-1]].reshape(len(window), -1)
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, -1]).mean()


train_step = jzero.make_train_step(loss_fn, optax.adamw(1e-3), accumulate=2, clip_norm=1.0)


def train(offload):
    step = jzero.shard(train_step, stage=3, offload=offload)
    state = step.init(train_step.init, make_params, jax.random.key(0))
    for window in islice(batches(english(), batch=64, seq=16, vocab_size=256), 20):
        state, metrics = step(state, window)
        print(f"{float(metrics['loss']):.4f}", end=" ", flush=True)
    print()
    return step, state, window, float(metrics["loss"])


print(f"{jax.device_count()} devices, stage 3, all of it on the device:")
*_, loss_alone = train(None)

print(f"{jax.device_count()} devices, stage 3, moments in host memory:")
step, state, window, loss = train(jzero.Offload(opt_state="host"))  # the one line
assert abs(loss - loss_alone) < 1e-4 * loss_alone

report = step.report(state, window)
each_mb = report.offload["at_rest"]["device"] / 1e6
whole_mb = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))) / 1e6
host_mb = report.offload["at_rest"]["pinned_host"] / 1e6
print(f"state per device: {each_mb:.2f} MB instead of {whole_mb:.2f} MB; {host_mb:.2f} MB in host memory")
