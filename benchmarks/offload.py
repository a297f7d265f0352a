"""What the NVMe tier moves, and in how much memory.

    python benchmarks/offload.py [--claims rate,memory,training] [--mb 1024] [--repeats 5] [--folder DIR] [--json FILE]

Three claims, each in fresh processes on one CPU device and one local disk:
    rate      bytes per second of a step's traffic (checksums, headers, fsync and commit included) over those of two `dd` with
              direct I/O, one that reads and one that writes as much at the same time, taking turns: at least 0.80. Beside it
              the same over one `dd` after the other.
    memory    the most that resident memory grows by while a state of eight pools goes through the pool, over the pool: at most
              1.10
    training  AdamW with moments of four pools: losses as with moments in memory, and the growth of resident memory beyond that
              of SGD without moments on the same model, over the pool and the two buckets that the device holds (here the
              device's memory is the process's): at most 1.10. The same with parameters in files too; and between two steps
              what is resident beyond SGD's and without its parameters, over the pool: at most 1.10, for nothing else is there
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LEAF_BYTES = 2**24
NUM_LEAVES = 16  # of the model that trains
KINDS = ("sgd", "adamw", "nvme", "files")  # on the device; with moments in files; with parameters there too
BUCKETS = {"nvme": 2, "files": 3}  # arrays of a leaf that lie in files, all of which make a bucket


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="bytes that a step reads, and writes, in 2^20")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's for temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--claims", default="rate,memory,training")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # As for any training on CPU devices (README): memory that is freed goes back, so that what is resident is in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        run = lambda part: in_fresh_process(part, folder, options)
        chosen = options.claims.split(",")
        found = {claim: run(claim) for claim in ("rate", "memory") if claim in chosen}
        if "training" in chosen:
            found["training"] = training({part: run(part) for part in KINDS})
    finally:
        shutil.rmtree(folder)
    found |= {"mb": options.mb, **machine()}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def in_fresh_process(part, folder, options):
    words = ["--part", part, "--mb", str(options.mb), "--repeats", str(options.repeats), "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# The tier alone -------------------------------------------------------------------------------------------------------


def placed(folder, num_leaves):
    """A tier and leaves of 16 MiB that rest in it."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jzero.offload.nvme.tier import NVMeTier

    tier = NVMeTier(str(folder / "swap"))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    value = np.random.default_rng(0).random(LEAF_BYTES // 4, np.float32)
    names = [f"leaf{i}" for i in range(num_leaves)]
    tier.check([(name, jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)) for name in names])
    return tier, [tier.place([name], [value], [sharding])[0] for name in names], value


def step(tier, leaves, number, per_bucket=2):
    """What a step does to its moments, without an update: they are fetched and put back as they are."""
    from jzero.offload.tier import Trip

    buckets = [leaves[at : at + per_bucket] for at in range(0, len(leaves), per_bucket)]
    trips = [Trip(bucket, bucket) for bucket in buckets]
    tier.begin(number, trips)
    arriving, after = [tier.fetch(trip, None) for trip in trips[:2]], []
    for at, trip in enumerate(trips):
        after += tier.put_back(trip, arriving[at].result()).result()
        arriving[at] = None
        arriving += [tier.fetch(trips[at + 2], None)] if at + 2 < len(trips) else []
    tier.settle()
    tier.end()
    return after


def rate(options):
    tier, leaves, _ = placed(options.folder, options.mb * 2**20 // LEAF_BYTES)
    files = Files(options.folder, options.mb)
    times = {"step_s": [], "dd_at_once_s": [], "dd_in_turn_s": []}
    for number in range(options.repeats + 1):
        os.sync()
        start = time.perf_counter()
        leaves = step(tier, leaves, number)
        taken = [time.perf_counter() - start, files.at_once(), files.in_turn()]
        if number:  # the first writes into blocks that were never written
            for values, seconds in zip(times.values(), taken, strict=True):
                values.append(round(seconds, 3))
    median = {name: statistics.median(values) for name, values in times.items()}
    pairs = list(zip(*times.values(), strict=True))
    rates = {name.replace("_s", "_mb_per_s"): round(2 * options.mb * 2**20 / 1e6 / value) for name, value in median.items()}
    return {"over_dd_at_once": round(statistics.median(dd / own for own, dd, _ in pairs), 3), "at_least": 0.80,
            "over_dd_in_turn": round(statistics.median(dd / own for own, _, dd in pairs), 3), **rates, "times": times,
            "direct": tier.speed.is_direct, "pool_bytes": tier.pool.num_bytes}  # fmt: skip


class Files:
    """What `dd` reads and writes: files like the swap's, made of random bytes."""

    def __init__(self, folder, mb):
        self.old, self.new = folder / "dd-old", folder / "dd-new"
        self.source = Path("/dev/shm") / f"jzero-{os.getpid()}"
        self.count, block = mb // 8, np.random.default_rng(0).bytes(2**23)
        for path in (self.old, self.new):
            with path.open("wb") as file:
                for _ in range(self.count):
                    file.write(block)

    def _commands(self):
        common = ["bs=8M", f"count={self.count}"]
        read = ["dd", f"if={self.old}", "of=/dev/null", "iflag=direct", *common]
        return read, ["dd", "if=/dev/zero", f"of={self.new}", "oflag=direct", "conv=notrunc,fsync", *common]

    def at_once(self):
        os.sync()
        start = time.perf_counter()
        for process in [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in self._commands()]:
            assert process.wait() == 0
        return time.perf_counter() - start

    def in_turn(self):
        os.sync()
        start = time.perf_counter()
        for command in self._commands():
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start


def memory(options):
    tier, leaves, _ = placed(options.folder, options.mb * 2**20 // LEAF_BYTES)
    before = resident_bytes("VmRSS")
    forget_peak()
    for number in range(4):
        leaves = step(tier, leaves, number)
    growth, pool = resident_bytes("VmHWM") - before, tier.pool.num_bytes
    state = len(leaves) * LEAF_BYTES
    return {"growth_over_pool": round(growth / pool, 3), "at_most": 1.10, "growth_bytes": growth, "pool_bytes": pool,
            "state_over_pool": state / pool}  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------


def train(options, kind):
    """Losses, and the resident memory that steps need beyond that of the process before the state was made."""
    import jax
    import jax.numpy as jnp
    import optax

    import jzero

    width = int((LEAF_BYTES / 4) ** 0.5)

    def loss(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean((x - 0.5) ** 2)

    tx = optax.sgd(1e-3) if kind == "sgd" else optax.adamw(1e-4)
    where, offload = f"nvme:{options.folder / 'swap'}", None
    if kind in BUCKETS:
        params = where if kind == "files" else None
        offload = jzero.Offload(opt_state=where, params=params, bucket_bytes=BUCKETS[kind] * LEAF_BYTES)
    train_step = jzero.make_train_step(loss, tx)
    one = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(devices=jax.devices()[:1]), offload=offload)

    def make():
        keys = jax.random.split(jax.random.key(0), NUM_LEAVES)
        return {f"w{i:02}": jax.random.normal(key, (width, width)) / width**0.5 for i, key in enumerate(keys)}

    before = resident_bytes("VmRSS")
    state = one.init(train_step.init, make)
    losses, x = [], np.random.default_rng(0).normal(size=(8, width)).astype(np.float32)
    for i in range(6):
        state, metrics = one(state, x)
        losses.append(float(metrics["loss"]))
        if i == 1:
            forget_peak()
    del metrics
    gc.collect()
    growth, at_rest = resident_bytes("VmHWM") - before, resident_bytes("VmRSS") - before
    pool = one.report(state, x).offload["places"][where]["pool_bytes"] if offload else None
    return {"losses": losses, "growth_bytes": growth, "at_rest_bytes": at_rest, "pool_bytes": pool}


def training(runs):
    return {kind: beside(runs, kind) for kind in BUCKETS}


def beside(runs, kind):
    """What one run with files needs beyond SGD on the device, and its losses beside those without files."""
    own, sgd, adamw = runs[kind], runs["sgd"], runs["adamw"]
    extra, params = own["growth_bytes"] - sgd["growth_bytes"], NUM_LEAVES * LEAF_BYTES
    pool, buckets, state = own["pool_bytes"], 2 * BUCKETS[kind] * LEAF_BYTES, BUCKETS[kind] * params
    apart = max(abs(a / b - 1) for a, b in zip(own["losses"], adamw["losses"], strict=True))
    found = {"state_over_pool": state / pool, "at_most": 1.10,
             "extra_over_pool_and_buckets": round(extra / (pool + buckets), 3), "extra_bytes": extra,
             "pool_bytes": pool, "bucket_bytes": buckets // 2, "bytes_in_files": state,
             "adamw_extra_bytes": adamw["growth_bytes"] - sgd["growth_bytes"],
             "largest_relative_loss_difference": apart, "losses": own["losses"]}  # fmt: skip
    if kind == "files":
        at_rest = own["at_rest_bytes"] - (sgd["at_rest_bytes"] - params)
        found |= {"at_rest_over_pool": round(at_rest / pool, 3), "at_rest_bytes": at_rest,
                  "adamw_at_rest_bytes": adamw["at_rest_bytes"] - (sgd["at_rest_bytes"] - params)}  # fmt: skip
    return found


def resident_bytes(field):
    """`VmRSS` now, or `VmHWM`, the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def machine():
    import jax

    return {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__,
            "cores": os.cpu_count(), "load_at_end": [round(one, 2) for one in os.getloadavg()]}  # fmt: skip


PARTS = {
    "rate": rate,
    "memory": memory,
    **{kind: (lambda options, kind=kind: train(options, kind)) for kind in KINDS},
}

if __name__ == "__main__":
    main()
