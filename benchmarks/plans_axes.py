"""Which axes when: Llama 70B and 405B on 512 H100s and 1,024 v5p chips, the fastest plan that fits for each set of axes.

    python benchmarks/plans_axes.py [--out docs/plans/axes.md]

Closed form, one batch for all rows of a table, schedule 1F1B. Attention is counted as fused on all devices, as jzero's is on
GPUs in bf16 and not yet on TPUs. What the form was held against: docs/plan.md.
"""

import argparse
from pathlib import Path

import plans
from plans import ROOT, peak_of, speed, table

from jzero.plan import closed, search
from jzero.plan.job import Job, make
from jzero.plan.room import usable_bytes
from jzero.plan.times import times

PODS = {"h100:64x8": "512 H100", "v5p:8x8x16": "1,024 v5p"}
SEQ = 8192
BATCHES = {"llama-70b": 512, "llama-405b": 1024}  # sequences a step: 4 and 8 Mi tokens
AXES = {
    "ZeRO alone": set(), "tensor": {"tensor"}, "sequence": {"sequence"}, "pipe": {"pipe"}, "pipe and tensor": {"pipe", "tensor"}
}  # fmt: skip
_WIRES = ("data", "tensor", "sequence")
NAMES = ("axes", "stage", "mesh", "sequences", "k", "remat", "peak", "step", "tokens/s", "MFU", *_WIRES, "bubble")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plans" / "axes.md")
    args = parser.parse_args()
    parts = [TEXT]
    for model, batch in BATCHES.items():
        for target, pod in PODS.items():
            rows = [row(axes, model, target, batch) for axes in AXES]
            room = f"{usable_bytes(target) / 1e9:.1f} GB"
            parts.append(f"## {model} on {pod}: {batch} sequences of {SEQ:,} tokens a step, {room} of memory each\n")
            parts.append(table(NAMES, rows))
            print(parts[-2], parts[-1], sep="\n", flush=True)
    args.out.write_text("\n".join(parts))


def row(axes: str, model: str, target: str, batch: int) -> tuple[str, ...]:
    """The fastest of these axes that fits, as cells."""
    best = plans.fastest(model, target, SEQ, batch, fused=True, axes=AXES[axes])
    if best is None:
        return axes, *("-",) * 5, _why_none(model, target, batch, AXES[axes]), *("-",) * 7
    timed = times(best)
    mesh = " ".join(f"{axis}={size}" for axis, size in best.mesh.items())
    plan = (str(best.stage), mesh, str(best.micro_sequences), str(best.accumulate), best.remat)
    return axes, *plan, f"{peak_of(best, fused=True) / 1e9:.1f} GB", *speed(timed), *_wires(best, timed.wire_s), _bubble(best)


def _why_none(model: str, target: str, batch: int, axes: set[str]) -> str:
    every = search.candidates(make(model, target, seq=SEQ, batch=batch, any_split=True))
    tried = any(set(one.mesh) - {"replica", "data"} == axes for one in every)
    return "nothing fits" if tried else "too few sequences"


def _wires(job: Job, seconds: dict[str, float]) -> tuple[str, ...]:
    """What passes over these axes per device and step, and how long that takes."""
    moved = {axis: sum(kinds.values()) for axis, kinds in closed.wire(job).items()}
    return tuple(f"{moved[axis] / 1e9:.0f} GB, {seconds[axis]:.1f} s" if axis in moved else "-" for axis in _WIRES)


def _bubble(job: Job) -> str:
    from jzero.plan.pipelines import schedule_of

    return f"{schedule_of(job).waiting_fraction:.0%}" if job.pipe > 1 else "-"


TEXT = """# Which axes when

Made by `python benchmarks/plans_axes.py`: for each set of axes the fastest plan that fits, closed form, remat and stage free.
`k` is microbatches, `sequences` those of a device and microbatch; `data`, `tensor` and `sequence` are wire bytes per device and
step with the time they take alone (ZeRO's hides behind the layers at stage 3, also what it sends over `sequence`; sums over
`tensor` and the exchange of heads over `sequence` do not); `bubble` is the part of the
time in which a pipe stage waits, where a backward pass takes two forwards and stages meet once a tick, as in jzero's executor.
`too few sequences`: one for each device of the batch axes and microbatch, with two microbatches or more for each pipe stage, is
more than the batch has.

What the tables say:

- **ZeRO alone is enough where the batch has a sequence for every device.** Its gathers hide behind the layers. A `tensor`
  axis then earns its place by the memory it frees: 70B on 512 H100s runs with `dots` in place of `full`, 1.2 times as fast.
- **`tensor` where the batch is smaller than the pod.** 512 sequences cannot be split over 1,024 chips; two chips to a
  sequence can.
- **`sequence` rivals `tensor` there**: it splits the same work and memory, what it gathers more hides behind the layers, and
  only the exchange of heads is waited for. By the closed form 70B is 3 to 6% faster with it; nothing of that has been timed.
- **`tensor` costs where memory was no trouble**: for 405B its sums take 2 to 5 s of 75 to 84 that nothing hides.
- **`pipe` last.** Stages meet once a tick, so 1F1B waits for a third of the time with two microbatches a stage, and at
  stage 3 every tick gathers. It is for links between hosts that are too slow for ZeRO's traffic, and for models whose
  layers ZeRO's devices are too few to hold; neither is so on these pods.
"""


if __name__ == "__main__":
    main()
