"""What jzero costs beside a hand-written `jit` with the same shardings: step time, call overhead, tracing and compiling.

    python benchmarks/overhead.py [--devices 4] [--steps 40] [--json FILE]

Three claims, in one run on simulated CPU devices:
    step      median step time of jzero stage 3 over the hand-written program's, alternating, at most 1.02
    call      time of a call of a tiny step over the same call of plain `jit`, at most 100 microseconds
    compile   tracing plus compiling with the pass over the same without it, at most 1.10
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}".strip()
    os.environ.setdefault("PJRT_NPROC", "64")
    results = {"step": step_time(args.devices, args.steps), "call": call_overhead(), "compile": compile_time(args.devices)}
    results |= {"versions": versions(), "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def versions() -> dict[str, str]:
    import jax
    import jaxlib

    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
    }


# the model: a scanned GPT-like stack, the gather written by hand in the rival ---------------------------------------


def make_params(width: int = 256, num_layers: int = 4, vocab: int = 2048) -> dict[str, Any]:
    import jax

    keys = iter(jax.random.split(jax.random.key(0), 4))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    layers = {"w1": normal(num_layers, width, 4 * width), "w2": normal(num_layers, 4 * width, width)}
    return {"embed": normal(vocab, width), "head": normal(width, vocab), "layers": layers}


def loss_fn(params: dict[str, Any], tokens: Any, use: Any = lambda leaf: leaf) -> Any:
    """`use` is the identity for jzero's side, and the hand-written gather constraint for the rival."""
    import jax
    import optax

    x = use(params["embed"])[tokens[:, :-1]]

    @jax.checkpoint
    def layer(x: Any, w: dict[str, Any]) -> tuple[Any, None]:
        return x + jax.nn.gelu(x @ use(w["w1"])) @ use(w["w2"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ use(params["head"]), tokens[:, 1:]).mean()


def make_step(use: Any = lambda leaf: leaf) -> tuple[Any, Any]:
    import jax
    import optax

    optimizer = optax.adamw(1e-3)

    def step(state: Any, tokens: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, use)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, optimizer


def rivals(devices: int) -> tuple[Any, Any, Any, Any]:
    """jzero's stage 3, the hand-written `jit` with the same shardings and constraints, and two states."""
    import jax

    import jzero
    from jzero.engine import compiler

    mesh = jzero.make_mesh(data=devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    plain, optimizer = make_step()
    by_hand, _ = make_step(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole))
    ours = jzero.shard(plain, stage=3, mesh=mesh)
    params = make_params()
    state = (params, optimizer.init(params))
    shardings = ours.shardings(state)
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    theirs = jax.jit(
        by_hand, in_shardings=(shardings, batch), out_shardings=(shardings, None), donate_argnums=0,
        compiler_options=compiler.options(mesh),
    )  # fmt: skip
    return (
        ours,
        theirs,
        ours.place(state),
        jax.tree.map(lambda leaf, where: jax.device_put(leaf, where, may_alias=False), state, shardings),
    )


def step_time(devices: int, steps: int) -> dict[str, Any]:
    """Alternating steps of both, so that a drift of the machine meets both."""
    import jax

    ours, theirs, mine, other = rivals(devices)
    tokens = jax.random.randint(jax.random.key(1), (2 * devices, 129), 0, 2048)
    times: dict[str, list[float]] = {"jzero": [], "by hand": []}
    for index in range(steps + 3):
        start = time.perf_counter()
        mine, loss = ours(mine, tokens)
        loss.block_until_ready()
        middle = time.perf_counter()
        other, loss = theirs(other, tokens)
        loss.block_until_ready()
        if index >= 3:
            times["jzero"].append(middle - start)
            times["by hand"].append(time.perf_counter() - middle)
    ratios = [a / b for a, b in zip(times["jzero"], times["by hand"], strict=True)]
    medians = {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    return {"median_ratio": round(statistics.median(ratios), 4), "median_ms": medians, "steps": steps}


def call_overhead(calls: int = 2000) -> dict[str, float]:
    """A step that computes almost nothing over 148 leaves, so that the call itself is what is timed; on one device."""
    import jax
    import jax.numpy as jnp

    import jzero

    state = {"params": {f"w{index}": jnp.zeros((8, 8)) for index in range(148)}, "count": jnp.zeros((), jnp.int32)}

    def step(state: Any, x: Any) -> Any:
        return {**state, "count": state["count"] + 1}, x

    ours = jzero.shard(step, stage=0, mesh=jzero.make_mesh(data=1, devices=jax.devices()[:1]))
    placed = ours.place(state)
    theirs = jax.jit(
        step, donate_argnums=0, in_shardings=(ours.shardings(state), None), out_shardings=(ours.shardings(state), None)
    )
    other, x = ours.place(state), jnp.zeros((8,))
    blocks: dict[str, list[float]] = {"jzero": [], "jit": []}
    for _ in range(20):
        placed, elapsed = _timed(ours, placed, x, calls // 20)
        blocks["jzero"].append(elapsed)
        other, elapsed = _timed(theirs, other, x, calls // 20)
        blocks["jit"].append(elapsed)
    medians = {name: 1e6 * statistics.median(values) for name, values in blocks.items()}
    return {
        "overhead_us": round(medians["jzero"] - medians["jit"], 1),
        **{f"{name}_us": round(value, 1) for name, value in medians.items()},
    }


def _timed(fn: Any, state: Any, x: Any, calls: int) -> tuple[Any, float]:
    import jax

    start = time.perf_counter()
    for _ in range(calls):
        state, out = fn(state, x)
    jax.block_until_ready((state, out))
    return state, (time.perf_counter() - start) / calls


def compile_time(devices: int, repeats: int = 5) -> dict[str, float]:
    """Tracing, lowering and compiling, from cold caches each time, alternating."""
    import jax

    tokens = jax.ShapeDtypeStruct((2 * devices, 129), "int32")
    times: dict[str, list[float]] = {"jzero": [], "by hand": []}
    for _ in range(repeats):
        ours, theirs, mine, other = rivals(devices)
        for name, lower in (("jzero", partial(ours.lower, mine, tokens)), ("by hand", partial(theirs.lower, other, tokens))):
            jax.clear_caches()
            start = time.perf_counter()
            lower().compile()
            times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["jzero"], times["by hand"], strict=True)]
    medians = {f"{name}_s": round(statistics.median(values), 3) for name, values in times.items()}
    return {"median_ratio": round(statistics.median(ratios), 3), **medians}


if __name__ == "__main__":
    main()
