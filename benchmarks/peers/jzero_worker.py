"""jzero stage 3 training the GPT-2 that `cpu_peers.py` wrote down, on simulated CPU devices of one process.

`jzero_worker.py FOLDER OUT.json`, with XLA_FLAGS and the allocator's variables set by whoever starts it.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jzero
from jzero import models


def main(folder, out):
    folder, spec = Path(folder), json.loads((Path(folder) / "spec.json").read_text())
    fields = ("num_layers", "num_heads", "dim", "vocab_size", "max_seq")
    model = models.build(models.GPT2Config(**{name: spec[name] for name in fields}), scan_layers=spec["scan_layers"])
    optimizer = optax.adamw(spec["learning_rate"], weight_decay=spec["weight_decay"])
    train_step = jzero.make_train_step(model.loss, optimizer)
    step = jzero.shard(train_step, stage=3)
    state = step.place(train_step.init(to_params(np.load(folder / "weights.npz"), model, stacked=spec["scan_layers"])))
    losses, seconds, cpu_seconds = [], [], []
    for tokens in np.load(folder / "batches.npy"):
        start, cpu = time.perf_counter(), time.process_time()
        state, metrics = step(state, tokens)
        jax.block_until_ready(state)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    Path(out).write_text(json.dumps({"losses": losses, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def to_torch(params, num_layers):
    """Parameters under the names of `torch_worker.py`'s modules; its Linear keeps kernels as [out, in]."""
    arrays = {"wte.weight": params["wte"]["embedding"], "wpe.weight": params["wpe"]["embedding"]}
    arrays |= {"ln_f.weight": params["ln_f"]["scale"], "ln_f.bias": params["ln_f"]["bias"]}
    layers = params["layers"]
    for index, layer in enumerate(models.unstack(layers) if isinstance(layers, dict) else layers):
        for module, leaves in layer.items():
            for leaf, array in leaves.items():
                name = f"layers.{index}.{module}.{'bias' if leaf == 'bias' else 'weight'}"
                arrays[name] = array.T if leaf == "kernel" else array
    assert len(arrays) == 4 + 12 * num_layers
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def to_params(arrays, model, *, stacked):
    """The reverse of `to_torch`."""
    ours = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    listed = models.build(model.config, scan_layers=False)
    shapes = jax.eval_shape(listed.init, jax.random.key(0))

    def find(path, leaf):
        *module, last = (str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
        array = arrays[".".join([*module, ours[last]])]
        return jnp.asarray(array.T if last == "kernel" else array)

    params = jax.tree_util.tree_map_with_path(find, shapes)
    return {**params, "layers": models.stack(params["layers"])} if stacked else params


if __name__ == "__main__":
    main(*sys.argv[1:])
