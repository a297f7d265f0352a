"""What a checkpoint costs: how long training waits for a save, how fast it is written, how much memory restoring takes.

    python benchmarks/checkpoint.py [--mb 512] [--repeats 5] [--folder DIR] [--json FILE]

Three claims, in one run on simulated CPU devices and one local disk:
    blocked   time the loop waits in an asynchronous `save` over the whole time of a synchronous one, at most 0.10
    rate      bytes per second of a save, from the call to the finished checkpoint, checksums and fsync included, over
              what `dd conv=fsync` writes of the same size into the same folder, taking turns, at least 0.70
    memory    peak resident size during a restore less that before it, over the bytes of the state, at most 1.25
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
NUM_DEVICES = 4
NUM_LEAVES = 16  # of parameters; Adam's moments make it 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=512, help="the state's size in 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's for temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--restore-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_DEVICES}".strip()
    os.environ.setdefault("PJRT_NPROC", "64")
    if options.restore_in:
        print(json.dumps(restored(options.restore_in)))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        results = {**written(folder, options), "memory": restored_in_fresh_processes(folder, options.repeats)}
    finally:
        shutil.rmtree(folder)
    results |= {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), **machine(), "mb": options.mb}
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def make_step(width: int) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    import jzero

    def loss(params: Any, x: Any) -> Any:
        for weights in params.values():
            x = jnp.tanh(x @ weights)
        return jnp.mean(x**2)

    train_step = jzero.make_train_step(loss, optax.adamw(1e-3))
    step = jzero.shard(train_step, stage=3)
    make_params = lambda: {f"w{i}": jnp.ones((width, width)) / width for i in range(NUM_LEAVES)}
    step.shardings(jax.eval_shape(lambda: train_step.init(make_params())))
    return step, make_params


def written(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and save: asynchronously while training goes on, waiting for the end, and `dd` of as many bytes in between."""
    import jax
    import numpy as np

    import jzero

    width = int((options.mb * 1e6 / (3 * NUM_LEAVES * 4)) ** 0.5) // 64 * 64
    step, make_params = make_step(width)
    state = step.init(step.fn.init, make_params)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
    x = np.ones((8, width), np.float32)
    manager = jzero.CheckpointManager(folder / "run", keep=1, step=step)
    times: dict[str, list[float]] = {"blocked_s": [], "synchronous_s": [], "dd_s": []}
    for i in range(options.repeats + 1):  # the first is not counted: Orbax compiles, threads start
        state, metrics = step(state, x)
        jax.block_until_ready((state, metrics))
        os.sync()
        start = time.perf_counter()
        manager.save(2 * i, state)
        blocked = time.perf_counter() - start
        for _ in range(3):
            state, metrics = step(state, x)
        manager.wait()
        jax.block_until_ready((state, metrics))
        os.sync()
        start = time.perf_counter()
        manager.save(2 * i + 1, state)
        manager.wait()
        synchronous = time.perf_counter() - start
        os.sync()
        taken = (blocked, synchronous, dd(folder, num_bytes))
        if i:
            for values, seconds in zip(times.values(), taken, strict=True):
                values.append(round(seconds, 4))
    manager.close()
    return {"state_bytes": num_bytes, **blocked_and_rate(times, num_bytes), "times": times}


def dd(folder: Path, num_bytes: int) -> float:
    """Seconds that `dd` needs for as many bytes, on the disk and not only in the system's cache."""
    target = folder / "dd"
    count = round(num_bytes / 2**20)
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={count}", "conv=fsync"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def blocked_and_rate(times: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    pairs = list(zip(times["blocked_s"], times["synchronous_s"], times["dd_s"], strict=True))
    rates = {name: round(num_bytes / statistics.median(times[name]) / 1e6) for name in ("synchronous_s", "dd_s")}
    return {
        "blocked": {"median_ratio": round(statistics.median(one / whole for one, whole, _ in pairs), 4), "at_most": 0.10},
        "rate": {
            "median_ratio": round(statistics.median(plain / whole for _, whole, plain in pairs), 3),
            "at_least": 0.70,
            "save_mb_per_s": rates["synchronous_s"],
            "dd_mb_per_s": rates["dd_s"],
        },
    }


def restored_in_fresh_processes(folder: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--restore-in", str(folder / "run")]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeats)]
    ratios = [run["growth_bytes"] / run["state_bytes"] for run in runs]
    return {"largest_ratio": round(max(ratios), 3), "at_most": 1.25, "ratios": [round(one, 3) for one in ratios]}


def restored(folder: Path) -> dict[str, int]:
    """In a fresh process: the peak of its resident memory before and after a restore; the state lives in that memory too."""
    import jax

    import jzero

    step, _ = make_step_like(folder)
    forget_peak()
    before = resident_bytes("VmRSS")
    state, _ = jzero.CheckpointManager(folder).restore(step)
    jax.block_until_ready(state)
    after = resident_bytes("VmHWM")
    num_bytes = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        if hasattr(leaf, "nbytes") and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for shard in leaf.addressable_shards
    )
    return {"growth_bytes": after - before, "state_bytes": num_bytes}


def make_step_like(folder: Path) -> Any:
    newest = max(folder.glob("[0-9]*"), key=lambda path: int(path.name))
    leaves = json.loads((newest / "jzero" / "metadata").read_text())["leaves"]
    return make_step(max(leaf["shape"][0] for leaf in leaves if len(leaf["shape"]) == 2))


def resident_bytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM`, the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    versions = {"jax": jax.__version__, "orbax-checkpoint": ocp.__version__, "python": sys.version.split()[0]}
    return {"versions": versions, "cores": os.cpu_count(), "load_at_end": [round(one, 2) for one in os.getloadavg()]}


if __name__ == "__main__":
    main()
