"""The same GPT-2, weights and batches in jzero stage 3, PyTorch FSDP2 and DeepSpeed stage 3, on CPU, in one run.

    python benchmarks/cpu_peers.py [--peer-python PYTHON] [--out FILE.json]

Two processes (torch) or two devices (jzero), fp32. The peers get an environment of their own from the extra `peers`, made by
`--peer-python`, for torch may have no CPU build for this Python. All run with the same allocator settings, in turns,
`--rounds` times; the first steps of each are not timed. Exits with 1 if losses differ by more than 1e-3.
"""

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "peers"
SPEC = {
    "vocab_size": 8192, "max_seq": 256, "dim": 256, "num_layers": 4, "num_heads": 4, "batch": 8, "seq": 256,
    "learning_rate": 1e-3, "weight_decay": 1e-4, "num_processes": 2, "num_threads": 1, "scan_layers": True,
}  # fmt: skip
NAMES = {"jzero": "jzero stage 3", "fsdp2": "PyTorch FSDP2", "deepspeed": "DeepSpeed ZeRO-3"}
NUM_UNTIMED = 3
LOSS_TOLERANCE = 1e-3


def main():
    options = parse()
    sys.path.insert(0, str(ROOT))
    peer_python = options.peer_env / "bin" / "python"
    make_peer_environment(options.peer_python, options.peer_env)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        runs = {kind: [] for kind in NAMES}
        for index in range(options.rounds):
            order = list(NAMES)[index % 3 :] + list(NAMES)[: index % 3]  # another one goes first each round
            for kind in order:
                print(f"round {index + 1} of {options.rounds}: {NAMES[kind]}", file=sys.stderr)
                runs[kind].append(run(kind, Path(folder), peer_python))
    found = summary(runs, peer_python, options)
    print(markdown(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["largest_loss_difference"] <= LOSS_TOLERANCE else 1


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that makes the peers' environment")
    parser.add_argument("--peer-env", type=Path, default=ROOT / "build" / "peers", help="where that environment is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--unroll", action="store_true", help="jzero's layers as a list and not as a scan")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_peer_environment(python, folder):
    """torch and DeepSpeed at the versions that the extra `peers` starts from."""
    if (folder / ".complete").exists():
        return
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    print(f"installing {', '.join(extras['peers'])} into {folder}", file=sys.stderr)
    subprocess.run([python, "-m", "venv", folder], check=True)
    floors = [requirement.replace(">=", "==") for requirement in extras["peers"]]
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "numpy"]
    # torch first: DeepSpeed's own set-up imports it.
    subprocess.run([*pip, *(floor for floor in floors if floor.startswith("torch"))], check=True)
    subprocess.run([*pip, *floors], check=True)
    (folder / ".complete").touch()


def write_inputs(folder, options):
    """Weights under torch's names and batches of real text: word pieces would need a tokenizer, so pairs of bytes it is."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from benchmarks.peers.jzero_worker import to_torch
    from jzero import data, models

    spec = {**SPEC, "scan_layers": not options.unroll}
    fields = ("num_layers", "num_heads", "dim", "vocab_size", "max_seq")
    model = models.build(models.GPT2Config(**{name: spec[name] for name in fields}))
    params = jax.jit(model.init)(jax.random.key(0))
    np.savez(folder / "weights.npz", **to_torch(params, spec["num_layers"]))
    text = data.english()
    ids = (text[:-1:2].astype(np.uint32) * 256 + text[1::2]) % spec["vocab_size"]
    batches = [data.batch_at(ids, step, batch=spec["batch"], seq=spec["seq"]) for step in range(options.steps)]
    np.save(folder / "batches.npy", np.stack(batches))
    (folder / "spec.json").write_text(json.dumps({**spec, "num_params": model.num_params}))


def run(kind, folder, peer_python):
    from jzero.bench.start import MALLOC, simulation_environment

    out, environ = folder / "out.json", {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(SPEC["num_threads"])}
    if kind == "jzero":
        environ = simulation_environment({**environ, "PYTHONPATH": str(ROOT)}, SPEC["num_processes"])
        command = [sys.executable, WORKERS / "jzero_worker.py", folder, out]
    else:
        environ.pop("PYTHONPATH", None)
        launch = ["torch.distributed.run", f"--nproc-per-node={SPEC['num_processes']}", f"--master-port={free_port()}"]
        command = [peer_python, "-m", *launch, WORKERS / "torch_worker.py", kind, folder, out]
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{NAMES[kind]} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return json.loads(out.read_text())


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def summary(runs, peer_python, options):
    results = {kind: figures(many) for kind, many in runs.items()}
    peers = [results[kind] for kind in ("fsdp2", "deepspeed")]
    pairs = [abs(a - b) for one in results.values() for a, b in zip(one["losses"], results["jzero"]["losses"], strict=True)]
    return {
        "results": results,
        "ratio_to_faster_peer": results["jzero"]["step_s"]["median"] / min(peer["step_s"]["median"] for peer in peers),
        "cpu_ratio_to_faster_peer": results["jzero"]["cpu_s"] / min(peer["cpu_s"] for peer in peers),
        "largest_loss_difference": max(pairs),
        "spec": {**SPEC, "scan_layers": not options.unroll},
        "rounds": options.rounds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(peer_python),
        "command": " ".join(
            ["python", "benchmarks/cpu_peers.py", *(f"--{n} {getattr(options, n)}" for n in ("rounds", "steps"))]
        ),
    }


def figures(many):
    """All timed steps of all rounds together; CPU seconds are summed over a step's processes and threads."""
    steps = sorted(second for one in many for second in one["seconds"][NUM_UNTIMED:])
    cpu = sorted(second for one in many for second in one["cpu_seconds"][NUM_UNTIMED:])
    assert all(one["losses"] == many[0]["losses"] or max_difference(one, many[0]) < LOSS_TOLERANCE for one in many)
    times = {"median": steps[len(steps) // 2], "min": steps[0], "max": steps[-1]}
    return {"step_s": times, "cpu_s": cpu[len(cpu) // 2], "losses": many[0]["losses"]}


def max_difference(one, other):
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def versions(peer_python):
    ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    mine = subprocess.run([sys.executable, "-c", ask % ["jax", "flax", "optax"]], capture_output=True, text=True, check=True)
    theirs = subprocess.run([peer_python, "-c", ask % ["torch", "deepspeed"]], capture_output=True, text=True, check=True)
    return {**json.loads(mine.stdout), **json.loads(theirs.stdout)}


def markdown(found):
    rows = ["| | step, s: median [min..max] | CPU s per step | first loss | last loss |", "|---|---|---|---|---|"]
    for kind, one in found["results"].items():
        times = one["step_s"]
        spread = f"{times['median']:.2f} [{times['min']:.2f}..{times['max']:.2f}]"
        rows.append(f"| {NAMES[kind]} | {spread} | {one['cpu_s']:.2f} | {one['losses'][0]:.4f} | {one['losses'][-1]:.4f} |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    ratios = f"{found['ratio_to_faster_peer']:.2f} in time, {found['cpu_ratio_to_faster_peer']:.2f} in CPU seconds"
    result = f"jzero to the faster peer: {ratios}. Largest loss difference: {found['largest_loss_difference']:.1e}."
    return "\n".join([*rows, "", result, f"{found['machine']}; {re.sub(r'[+]cpu', '', versions)}."])


if __name__ == "__main__":
    sys.exit(main())
