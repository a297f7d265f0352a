"""Adam with moments in 8 bits and in bfloat16 beside float32: the loss after 300 steps, and the bytes.

    python benchmarks/moments.py [--steps 300] [--json FILE]

A GPT-2 of 0.66 million parameters on the bench's text (Python's documentation), the same weights and batches for each. Claims:
    loss    the mean of the last 20 steps' losses within 1% of float32's
    bytes   of the optimizer's state as computed: n + 4 n / 256 and 2 n bytes a moment, where float32 has 4 n
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LAST = 20
WITHIN = 0.01


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import optax

    import jzero

    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 20, options.steps, 2e-4)
    tx = optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    kinds = {"float32": lambda tx: tx, "8 bits": jzero.optim.moments_8bit, "bfloat16": jzero.optim.moments_bf16}
    runs = {name: run(wrap(tx), options.steps) for name, wrap in kinds.items()}
    exact = runs["float32"]["loss"]
    for one in runs.values():
        one["loss_over_float32"] = round(one["loss"] / exact, 5)
    found = {"runs": runs, "steps": options.steps, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"),
             "command": " ".join(["python", *sys.argv])}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for one in runs.values():
        del one["losses"]
    print(json.dumps(found, indent=1))
    apart = [name for name, one in runs.items() if abs(one["loss_over_float32"] - 1) > WITHIN]
    wrong = [name for name, one in runs.items() if one["moment_bytes"] != one["moment_bytes_computed"]]
    sys.exit(bool(apart or wrong))


def run(tx, steps):
    """Losses, and the bytes of the optimizer's arrays."""
    import jax

    import jzero
    from jzero.data import batch_at, load
    from jzero.models import build
    from jzero.optim import blocks

    model = build("gpt2-tiny", num_layers=3, num_heads=4, dim=128)
    train_step = jzero.make_train_step(model.loss, tx, clip_norm=1.0)
    state = train_step.init(model.init(jax.random.key(0)))
    step, ids, losses = jax.jit(train_step, donate_argnums=0), load(), []
    start = time.perf_counter()
    for i in range(steps):
        state, metrics = step(state, batch_at(ids, i, batch=8, seq=128))
        losses.append(float(metrics["loss"]))
    seconds = time.perf_counter() - start
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.params)]
    sizes = {
        "Moments8bitState": sum(blocks.num_bytes(shape) if size(shape) >= 4096 else 4 * size(shape) for shape in shapes),
        "MomentsBf16State": sum(2 * size(shape) for shape in shapes),
    }
    computed = 2 * sizes.get(type(state.opt_state).__name__, sum(4 * size(shape) for shape in shapes))
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    return {"loss": round(sum(losses[-LAST:]) / LAST, 5), "moment_bytes": found, "moment_bytes_computed": computed,
            "seconds": round(seconds, 1), "first_loss": losses[0], "losses": [round(one, 5) for one in losses]}  # fmt: skip


def size(shape):
    return math.prod(shape)


if __name__ == "__main__":
    main()
