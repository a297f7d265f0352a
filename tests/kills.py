"""A training run that SIGKILL ends again and again, at random moments of starting, training and saving.

    python tests/kills.py --kills 100 [--seed 0] [--json FILE]

Every life is a fork of this process, which has imported jax and started no backend, so a start costs no imports; compiled
programs are kept on disk. A life resumes from the newest complete checkpoint or begins, and writes down what it restored and
every loss. All lives are held against one run that nobody ended: each loss and each restored state must be the same bits.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

NUM_DEVICES = 4
SAVE_EVERY = 4
PAUSE_SECONDS = 0.02  # between steps, so that there are moments without a save under way

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
os.environ.setdefault("PJRT_NPROC", "64")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "laws")]

import jax
import numpy as np
import tiny
import xxhash

import jzero


def digest(state):
    keys = lambda leaf: jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        sha256.update(np.asarray(keys(leaf)).tobytes())
    return sha256.hexdigest()


def batch_of(i):
    return np.random.default_rng((7, i)).normal(size=(24, 24)).astype(np.float32)


def live(say, folder, num_steps, *, digests):
    """One life."""
    train_step, make_state = tiny.make("composed")
    step = jzero.shard(train_step, stage=3, min_shard_elements=64)
    manager = jzero.CheckpointManager(folder, every=SAVE_EVERY, keep=2)
    first = 1
    if manager.steps():
        state, first = manager.restore(step)
        say("restored", manager.restored, digest(state))
    else:
        state = step.place(make_state(tiny.make_params()))
        say("began")
    for i in range(first, num_steps + 1):
        state, metrics = step(state, batch_of(i))
        say("step", i, float(metrics["loss"]).hex(), digest(state) if digests and i % SAVE_EVERY == 0 else None)
        if i % SAVE_EVERY == 0:
            say("saving", i)
        manager.save(i, state, data=i + 1)
        time.sleep(PAUSE_SECONDS)
    manager.wait()


def fork(live, log, *words, **options):
    """The process of a life, `live(say, ...)`. `log` gets a line for each event, written at once, and how the life ended."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    say = lambda *words: os.write(out, (json.dumps(words) + "\n").encode())
    try:
        live(say, *words, **options)
        say("ended")
    except BaseException:
        say("failed", traceback.format_exc())
    os._exit(0)


def uninterrupted(live, where, num_steps):
    """The events of a whole life, and compiled programs on disk for all that follow."""
    jax.config.update("jax_compilation_cache_dir", str(where / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.waitpid(fork(live, where / "whole.log", where / "whole", num_steps, digests=True), 0)
    whole = events(where / "whole.log")
    assert whole[-1] == ["ended"], whole[-1]
    return whole


def events(log):
    """The whole lines of a life."""
    text = Path(log).read_bytes() if Path(log).exists() else b""
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def complete(folder):
    return {int(path.name) for path in Path(folder).glob("*") if path.name.isdigit()}


def damaged(folder):
    """Numbered checkpoints that are not whole, without jax: this process must not start a backend."""
    found = []
    for number in sorted(complete(folder)):
        arrays = Path(folder) / str(number) / "state"
        try:
            listed = json.loads((arrays / "checksums.json").read_text())
            whole = (arrays.parent / "jzero" / "metadata").exists()
            sums = {name: xxhash.xxh3_128((arrays / name).read_bytes()).hexdigest() for name in listed}
            whole = whole and sums == {name: entry["xxh3_128"] for name, entry in listed.items()}
        except OSError as error:
            whole = error.filename
        found += [] if whole is True else [f"checkpoint {number} is visible and not whole ({whole})"]
    return found


def is_gone(pid):
    return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def kill_at(pid, log, event, num, seconds):
    """SIGKILL some seconds after the life said `event` for the `num`-th time; whether it was still there."""
    while sum(said[0] == event for said in events(log)) < num and not is_gone(pid):
        time.sleep(0.002)
    time.sleep(seconds)
    return kill(pid)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kill_once(pid, log, random, life_seconds):
    """SIGKILL at a random moment; whether the life was still there. Every other one waits until a save has begun."""
    if random.random() < 0.5:
        return kill_at(pid, log, "saving", random.randint(1, 3), random.uniform(0, 0.3))
    end = time.monotonic() + random.uniform(0, life_seconds)
    while time.monotonic() < end and not is_gone(pid):
        time.sleep(0.001)
    return kill(pid)


def check_life(life, reference, before):
    """What is wrong with one life, given the complete checkpoints that it found: one line each."""
    wrong = [event[1] for event in life if event[0] == "failed"]
    for event in life:
        if event[0] == "began" and before:
            wrong.append(f"began anew although there were checkpoints {sorted(before)}")
        if event[0] == "restored" and event[1] != max(before, default=None):
            wrong.append(f"restored {event[1]}, the newest of {sorted(before)} was there")
        if event[0] == "restored" and event[2] != reference[event[1]][1]:
            wrong.append(f"restored {event[1]} with other bits")
        if event[0] == "step" and event[2] != reference[event[1]][0]:
            wrong.append(f"step {event[1]}: loss {event[2]}, uninterrupted {reference[event[1]][0]}")
    return wrong


def run(where, num_kills, seed, num_steps, life_seconds):
    reference = {event[1]: (event[2], event[3]) for event in uninterrupted(live, where, num_steps) if event[0] == "step"}

    choose, folder, wrong = random.Random(seed), where / "killed", []
    found = {"kills": 0, "in_start": 0, "in_training": 0, "with_a_half_written_checkpoint": 0, "resumed": 0, "runs": 1}
    lives, whole_again = 0, None
    while found["kills"] < num_kills or whole_again != "ended":
        lives += 1
        before, log = complete(folder), where / f"life{lives}.log"
        pid = fork(live, log, folder, num_steps, digests=False)
        if found["kills"] < num_kills:
            found["kills"] += kill_once(pid, log, choose, life_seconds)
        else:
            os.waitpid(pid, 0)
        life = events(log)
        wrong += [f"life {lives}: {line}" for line in check_life(life, reference, before) + damaged(folder)]
        kinds = [event[0] for event in life]
        whole_again = kinds[-1] if kinds else None
        found["in_start" if not life else "in_training"] += whole_again != "ended"
        half_written = any("orbax-checkpoint-tmp" in path.name for path in folder.glob("*"))
        found["with_a_half_written_checkpoint"] += half_written and "saving" in kinds  # its own, not an older life's
        found["resumed"] += "restored" in kinds
        if "failed" in kinds:
            break
        if whole_again == "ended" and found["kills"] < num_kills:  # ended before it could be killed: once more from the start
            folder, found["runs"] = where / f"killed{lives}", found["runs"] + 1
    steps = sum(event[0] == "step" for log in where.glob("life*.log") for event in events(log))
    return {**found, "lives": lives, "losses_compared": steps, "wrong": wrong}


def main(about, run, script, num_kills, **options):
    """The command of a script of kills: `run(folder, options)` is a dict, whose "wrong" must be empty."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"kills": num_kills, "seed": 0, "steps": 400, **options}
    for name, value in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--json", type=Path)
    chosen, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as where:
        result = run(Path(where), *(getattr(chosen, name) for name in options))
    result["seconds"] = round(time.monotonic() - began, 1)
    result["command"] = " ".join(["python", f"tests/{Path(script).name}", *sys.argv[1:]])
    print(json.dumps(result, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main(__doc__, run, __file__, 100, life_seconds=6.0)
