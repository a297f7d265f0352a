"""A training run with its moments on NVMe that SIGKILL ends again and again, most often in the middle of an update.

    python tests/kills_nvme.py --kills 50 [--seed 0] [--params device|nvme] [--json FILE]

As `tests/kills.py`, whose lives and checkpoints these are: each life restores the newest checkpoint, which writes the swap
anew, and trains on. After every kill the swap that the life left is read byte by byte, without jax: its commit names a step,
and the moments of all files must be those that an uninterrupted run had after that step, bit by bit. Losses likewise.
With `--params nvme` parameters lie in the same files, one of which does not train and is never written.
"""

import contextlib
import functools
import hashlib
import random

import kills  # sets the environment, so before jax

# isort: split
import jax
import numpy as np
import tiny

import jzero
from jzero.offload.nvme import folder as folders
from jzero.offload.nvme import swap
from jzero.offload.nvme.array import DiskArray
from jzero.offload.nvme.shard_file import CorruptSwap, ShardFile

SAVE_EVERY = 3


def digest(leaves):
    """Of leaves by path."""
    sha256 = hashlib.sha256()
    for path in sorted(leaves):
        sha256.update(path.encode() + np.ascontiguousarray(leaves[path]).tobytes())
    return sha256.hexdigest()


def live(say, where, num_steps, *, digests, params):
    in_files = params == "nvme"
    train_step, make_state = tiny.make("composed", trainable=(lambda path: path != "bias") if in_files else None)
    swap_folder = f"nvme:{where / 'swap'}"
    offload = jzero.Offload(opt_state=swap_folder, params=swap_folder if in_files else None, bucket_bytes=2000)
    step = jzero.shard(train_step, stage=3, min_shard_elements=64, offload=offload)
    manager, first = jzero.CheckpointManager(where / "run", every=SAVE_EVERY, keep=2), 1
    if manager.steps():
        state, first = manager.restore(step)
        say("restored", manager.restored)
    else:
        state = step.place(make_state(tiny.make_params()))
        say("began")
    for i in range(first, num_steps + 1):
        say("updating", i)
        state, metrics = step(state, kills.batch_of(i))
        on_disk = {leaf.path: leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, DiskArray)}
        say("step", i, float(metrics["loss"]).hex(), digest(on_disk) if digests else None)
        manager.save(i, state, data=i + 1)
    manager.wait()


def check_swap(where, reference, life):
    """What the newest swap says: its step, and what is wrong with it."""
    found, wrong = None, []
    for left in folders.leftovers(where / "swap" / "process-0", set()):
        try:
            commit, leaves = swap.contents(left.folder)
        except FileNotFoundError:
            found = "never complete"
            continue
        except CorruptSwap as error:
            wrong.append(str(error))
            continue
        found = commit["step"]
        at_first = life[0][1] if life[0][0] == "restored" else 0  # the life's first generation, of no step of its own
        expected = reference.get(at_first if found is None else found)
        if expected is not None and digest(leaves) != expected:
            wrong.append(f"the swap of step {found} holds other numbers than the uninterrupted run had")
        made = [event[1] for event in life if event[0] == "step"]
        began = [event[1] for event in life if event[0] == "updating"]
        if found is not None and not (made[-1:] or [at_first])[0] <= found <= began[-1]:
            wrong.append(f"the swap is of step {found}, the life made {made[-1:]} and began {began[-1:]}")
    return found, wrong


def run(where, num_kills, seed, num_steps, params):
    life_of = functools.partial(live, params=params)
    whole = kills.uninterrupted(life_of, where, num_steps)
    losses = {event[1]: event[2] for event in whole if event[0] == "step"}
    moments = {event[1]: event[3] for event in whole if event[0] == "step"}
    choose, folder, wrong = random.Random(seed), where / "killed", []
    found = {"kills": 0, "in_an_update": 0, "with_a_half_written_generation": 0, "resumed": 0, "swaps_read": 0}
    lives = compared = 0
    while found["kills"] < num_kills:
        lives += 1
        log = where / f"life{lives}.log"
        pid = kills.fork(life_of, log, folder, num_steps, digests=False)
        # most often within an update, and never before the life's first
        found["kills"] += kills.kill_at(pid, log, "updating", choose.randint(1, 12), choose.uniform(0, 0.1))
        life = kills.events(log)
        wrong += [f"life {lives}: {event[1]}" for event in life if event[0] == "failed"]
        steps = [event for event in life if event[0] == "step"]
        compared += len(steps)
        wrong += [f"life {lives}: step {event[1]}: another loss" for event in steps if event[2] != losses[event[1]]]
        wrong += [f"life {lives}: {line}" for line in kills.damaged(folder / "run")]
        if life and life[0][0] in ("began", "restored"):
            at, bad = check_swap(folder, moments, life)
            wrong += [f"life {lives}: {line}" for line in bad]
            found["swaps_read"] += at is not None or not bad
            found["in_an_update"] += life[-1][0] == "updating"
            found["with_a_half_written_generation"] += half_written(folder)
            found["resumed"] += life[0][0] == "restored"
        if [event for event in life if event[0] in ("failed", "ended")]:
            folder = where / f"killed{lives}"
    return {**found, "lives": lives, "losses_compared": compared, "wrong": wrong}


def half_written(folder):
    """Whether some files of a swap, and not all, have the generation after the committed one."""
    return any(
        0 < newer < num_files for newer, num_files in map(written, folders.leftovers(folder / "swap" / "process-0", set()))
    )


def written(left):
    """The number of a swap's files that have the generation after the committed one, and of all that steps write."""
    try:
        commit, rows = swap.load(left.folder / swap.COMMIT), swap.load(left.folder / swap.LAYOUT)["leaves"]
    except (FileNotFoundError, CorruptSwap):
        return 0, 0
    newer, files = 0, [ShardFile.of(left.folder, row) for row in rows]
    files = [file for file in files if file.num_slots > 1]
    for file in files:
        with contextlib.suppress(CorruptSwap):  # no header yet
            newer += file.header(file.slot(commit["generation"] + 1))["generation"] == commit["generation"] + 1
    return newer, len(files)


if __name__ == "__main__":
    kills.main(__doc__, run, __file__, 50, params="device")
