"""What the compilers say our kernels take: registers and spills on H100, vector memory on TPUs. No device is needed.

    python benchmarks/kernel_resources.py --json benchmarks/results/kernel-resources.json [--targets h100:1x1,v5e:2x2]

One row per operation, shape and target, forward and backward kernels in the order of the program. Small leaves of an optimizer
share a kernel, and a kernel that an earlier row compiled is not said again.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OPS = ("norm", "quantize", "fused_adamw", "fused_lion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--targets", default="h100:1x1,v5e:2x2")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax.numpy as jnp

    from benchmarks import recorded
    from pallas_kernels.bench.cases import cases

    every = {
        f"{target} {op} {shape}": (target, case)
        for target in args.targets.split(",")
        for (op, shape), case in cases(tiny=False, dtype=jnp.bfloat16).items()
        if op in OPS
    }
    print(table(recorded.fill(args.json, list(every), lambda line: uses_of(*every[line]))))


def uses_of(target: str, case: Any) -> dict[str, Any]:
    """One row: what each kernel takes, or why there is none."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    import jzero
    import pallas_kernels
    from pallas_kernels.bench import resources

    device = jzero.topology(target)[0]
    arrays = jax.eval_shape(case.make, jax.random.key(0))
    given = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=SingleDeviceSharding(device)) for one in arrays]
    is_tpu, described = device.platform == "tpu", contextlib.nullcontext()
    if not is_tpu:  # Mosaic GPU asks which device it compiles for
        found = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="cuda")
        described = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=found))
    try:
        with pallas_kernels.target(device.device_kind), described, resources.listening() as said:
            run = case.run("mosaic_tpu" if is_tpu else "mosaic_gpu")
            compiled = jax.jit(run).lower(*given).compile()
    except NotImplementedError as error:
        return {"refused": str(error).splitlines()[0]}
    return {"kernels": [use._asdict() for use in resources.uses(compiled, said)]}


def table(rows: dict[str, Any]) -> str:
    """Markdown: one line per target and operation, over its shapes."""
    found: dict[tuple[str, str], list[Any]] = {}
    for name, row in rows.items():
        target, op, *_ = name.split()
        found.setdefault((target, op), []).extend(row.get("kernels", []))
    lines = ["| target | operation | kernels | registers | spilled bytes | vector memory, MB |", "|---|---|---|---|---|---|"]
    for (target, op), uses in found.items():
        of = lambda field, uses=uses: [use[field] for use in uses if use[field] is not None]
        span = lambda values: f"{min(values)} to {max(values)}" if values else "-"
        vmem = [round(size / 1e6, 1) for size in of("vmem_bytes")]
        spilled = str(sum(of("spill_bytes"))) if of("spill_bytes") else "-"
        lines.append(f"| {target} | `{op}` | {len(uses)} | {span(of('registers'))} | {spilled} | {span(vmem)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
