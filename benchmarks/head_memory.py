"""What the chunked head saves: a model's whole step, compiled for devices that are not there, with and without its logits.

    python benchmarks/head_memory.py --json benchmarks/results/head-memory.json  # compile what the file lacks
    python benchmarks/head_memory.py --cpu                                           # time of the head alone, by ratio, here

The claim: at 8,192 tokens per device the temporaries of Llama 8B's step (stage 3, bf16, remat full) fall by the logits'
bytes or more. The second command times the head's value and gradient on this machine, implementations in turn.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax

import jzero
import pallas_kernels
from benchmarks import recorded
from jzero import models
from jzero.models import matmul

IMPLEMENTATIONS = ("reference", "fused", "chunked")
# target, sequences per device, their length; or the head alone
SHAPES = ("h100:8x8 1 8192", "v5p:4x4x4 1 8192", "h100:8x8 4 2048", "v5p:4x4x4 4 2048", "h100:1x8 head", "v5p:2x2x1 head")
RIVAL = (4, 8192, 2560, 128256)  # batch, length, dim, vocabulary: the size that others published times for


def step_bytes(target: str, sequences: int, length: int, loss: str, model: str = "llama-8b") -> dict[str, Any]:
    """Compiled memory of one step per device."""
    devices = jzero.topology(target)
    built = models.build(model, loss=loss, attention="chunked")  # plain attention's scores would hide the head
    own = jzero.make_train_step(built.loss, optax.adamw(1e-4), precision="bf16")
    step = jzero.shard(own, stage=3, mesh=jzero.make_mesh(devices=devices), remat="full", strict=False)
    state = jax.eval_shape(lambda key: own.init(built.init(key)), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((sequences * len(devices), length + 1), jnp.int32)
    started = time.perf_counter()
    found = step.lower(state, tokens).compile().memory_analysis()
    logits = 2 * sequences * length * (built.config.padded_vocab_size or built.config.vocab_size)
    row = {"model": model, "target": target, "sequences": sequences, "length": length, "loss": loss}
    return {**row, "temp_bytes": found.temp_size_in_bytes, "logits_bytes": logits, "seconds": time.perf_counter() - started}


def head_bytes(target: str, implementation: str, num_chunks: int | None = None) -> dict[str, Any]:
    """The head's value and gradient alone on one device: temporaries and floating-point operations."""
    batch, length, dim, vocab = RIVAL
    sharding = jax.sharding.SingleDeviceSharding(jzero.topology(target)[0])
    shapes = [((batch, length, dim), jnp.bfloat16), ((dim, vocab), jnp.bfloat16), ((batch, length), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]

    def loss(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
        options = {"implementation": implementation, "num_chunks": num_chunks}
        return pallas_kernels.linear_cross_entropy_sum(x, w, targets, **options) / targets.size

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    flops = (compiled.cost_analysis() or {}).get("flops")
    row = {
        "target": target,
        "implementation": implementation,
        "num_chunks": num_chunks,
        "logits_bytes": 2 * batch * length * vocab,
    }
    return {**row, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "flops": flops}


def cpu_times(rounds: int = 7) -> dict[str, float]:
    """Median seconds of the head's value and gradient, the implementations taking turns."""
    batch, length, dim, vocab = 4, 512, 256, 16384
    keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), 3)
    x, w = jax.random.normal(keys[0], (batch, length, dim)), jax.random.normal(keys[1], (dim, vocab)) * dim**-0.5
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)

    def timed(name: str, num_chunks: int | None) -> Any:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            return pallas_kernels.linear_cross_entropy_sum(x, w, targets, implementation=name, num_chunks=num_chunks)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        """The reference with the products of jzero's models, whose weight gradient is fast on CPUs."""
        logits = matmul.matmul(x, w)
        hit = jnp.arange(vocab) == targets[..., None]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))

    steps = {"plain": jax.jit(jax.value_and_grad(plain, (0, 1))), **{name: timed(name, None) for name in IMPLEMENTATIONS}}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step(x, w))
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="compiled figures: read, and added to")
    parser.add_argument("--only", default="", help="compile only rows that contain this text")
    parser.add_argument("--cpu", action="store_true", help="the times of the head on this machine")
    options = parser.parse_args()
    if options.cpu:
        times = cpu_times()
        for name, seconds in times.items():
            print(f"{name:13} {seconds * 1e3:8.1f} ms   {seconds / times['plain']:.2f} of plain")
        return
    if options.json is None:
        parser.error("--json FILE, or --cpu")
    lines = [f"{shape} {name}" for shape in SHAPES for name in IMPLEMENTATIONS]
    print(table(recorded.fill(options.json, lines, compile_line, only=options.only)))


def compile_line(line: str) -> dict[str, Any]:
    target, *shape, name = line.split()
    return head_bytes(target, name) if shape == ["head"] else step_bytes(target, *map(int, shape), name)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One row per shape: temporaries by implementation, and by how much of the logits they fall."""
    head = "| target, sequences x length | logits | " + " | ".join(IMPLEMENTATIONS) + " | fall, chunked | of the logits |"
    body = []
    for shape in SHAPES:
        found = [rows.get(f"{shape} {name}") for name in IMPLEMENTATIONS]
        if not all(found):
            continue
        temps, logits = [one["temp_bytes"] for one in found], found[0]["logits_bytes"]
        cells = [shape, *(f"{size / 1e6:,.0f} MB" for size in (logits, *temps, temps[0] - temps[-1]))]
        body.append("| " + " | ".join([*cells, f"{(temps[0] - temps[-1]) / logits:.2f}"]) + " |")
    return "\n".join([head, "|---" * (len(IMPLEMENTATIONS) + 4) + "|", *body])


if __name__ == "__main__":
    main()
