"""Pretraining as people copy it: real text, evaluation, checkpoints, metrics. The same command starts, resumes and restarts.

    python examples/pretrain.py --out runs/a                                       # resumes where runs/a ends
    python -m jzero.launch -n 4 --max-restarts 3 examples/pretrain.py --out runs/a
    sbatch deploy/slurm.sh examples/pretrain.py --out /shared/runs/a

Without accelerators it trains a small GPT-2 on eight simulated devices. SIGTERM saves once more and exits with 143; a step that
does not end within ten minutes shows all stacks and exits with 124. Needs `pip install "jzero[train]"` (grain, tensorboardX).
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before jax is imported; only the CPU listens
os.environ.setdefault("PJRT_NPROC", "64")  # simulated devices that wait for each other each need a thread (docs/log.md)
os.environ.setdefault("JZERO_STEP_TIMEOUT", "600")  # seconds

import grain
import jax
import numpy as np
import optax

import jzero
from jzero import data, launch, models, preemption
from jzero.monitor import Monitor


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="checkpoints and metrics; a run resumes here")
    parser.add_argument("--text", help="UTF-8 text, or token ids as .npy or .bin; default: the English in Python")
    parser.add_argument("--model", default="gpt2-tiny")
    parser.add_argument("--layers", type=int, help="another number of layers than the model's")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=24, help="sequences per step, over all devices")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Windows:
    """Window i of a text: tokens [i seq, (i + 1) seq], one more than the model reads; grain shuffles the numbers."""

    def __init__(self, ids, seq):
        self.ids, self.seq = ids, seq

    def __len__(self):
        return (len(self.ids) - 1) // self.seq

    def __getitem__(self, index):
        return self.ids[index * self.seq : (index + 1) * self.seq + 1].astype(np.int32)


def make_data(options):
    """Batches for training, without end, and the last twentieth of the text for evaluation.

    Every process draws the same global batches and gives its own devices their rows, so the position is the same everywhere
    and a checkpoint goes on with any number of processes.
    """
    ids = data.load(options.text)
    split = len(ids) * 19 // 20
    train = grain.MapDataset.source(Windows(ids[:split], options.seq)).seed(options.seed).shuffle().repeat()
    held_out = grain.MapDataset.source(Windows(ids[split:], options.seq)).batch(options.batch, drop_remainder=True)
    return iter(train.batch(options.batch, drop_remainder=True).to_iter_dataset()), held_out


def on_devices(tokens, mesh):
    """tokens[B, T + 1] of numpy as tokens[B_data, T + 1] on the mesh; each process brings the rows of its own devices."""
    return jax.make_array_from_callback(tokens.shape, jax.NamedSharding(mesh, jax.P("data")), tokens.__getitem__)


def main():
    options = parse()
    launch.initialize()  # joins the other processes; alone it does nothing
    told_to_end = preemption.watch()
    batches, held_out = make_data(options)
    model = models.build(options.model, **({"num_layers": options.layers} if options.layers else {}))
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.lr, min(20, options.steps), options.steps + 1)
    train_step = jzero.make_train_step(
        model.loss, optax.adamw(schedule, weight_decay=0.1), precision=options.precision, clip_norm=1.0
    )
    step = jzero.shard(train_step, stage=options.stage)

    # The state goes in and comes out, so that evaluation gathers parameters as training does; it needs no second copy.
    evaluate = jzero.shard(
        lambda state, tokens: (state, model.loss(state.params, tokens)),
        stage=3 if options.stage else 0,  # jzero's own step splits parameters at rest from stage 1 on, which is called 3 here
        params=lambda state: state.params,
    )

    manager = jzero.CheckpointManager(options.out / "checkpoints", every=options.save_every, keep=3, step=step)
    if manager.steps():
        state, _ = manager.restore(step, data=batches, on_corrupt="previous")
        print(f"resumed at step {manager.restored} on {jax.device_count()} devices", flush=True)
    else:
        state = step.init(train_step.init, model.init, jax.random.key(options.seed))
        print(f"{model.num_params:,} parameters on {jax.device_count()} devices, stage {options.stage}", flush=True)
    first = (manager.restored or 0) + 1  # steps are counted from 1: checkpoint i is the state after i steps

    with Monitor(options.out, first_step=first, num_steps=options.steps) as monitor:
        for i in range(first, options.steps + 1):
            state, metrics = step(state, on_devices(next(batches), step.mesh))
            row = {name: metrics[name] for name in ("loss", "grad_norm", "num_skipped")}
            if i % options.eval_every == 0 or i == options.steps:
                losses = []
                for tokens in held_out:
                    state, loss = evaluate(state, on_devices(tokens, step.mesh))
                    losses.append(float(loss))
                row["eval_loss"] = float(np.mean(losses))
            monitor.write(i, row)
            ends = told_to_end.reached(i)
            if ends or i % options.save_every == 0 or i == options.steps:
                monitor.flush()  # lines up to a checkpoint are there before it is
                manager.save(i, state, data=batches, force=True)
            if ends:
                manager.wait()
                monitor.close()
                print(f"told to end: saved step {i}", flush=True)
                sys.exit(told_to_end.code)
    manager.wait()


if __name__ == "__main__":
    main()
