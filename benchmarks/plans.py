"""The plans of docs/plans: Llama 8B, 70B and 405B on pods of 64 to 4,096 devices, and published runs beside the roofline.

    python benchmarks/plans.py [--out docs/plans]

Closed form throughout, ZeRO alone (with more axes: benchmarks/plans_axes.py): for each pod the fastest combination of stage,
mesh, microbatch, accumulation and remat that fits, for at most 64M tokens a batch. On GPUs in bf16 attention is cuDNN's, which
writes no scores; jzero has no such kernel for TPUs yet, so plans for them hold the scores of plain attention. Which compiled
programs these figures were held against: docs/plan.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jzero.plan import closed, facts, search  # noqa: E402
from jzero.plan.job import Job, make  # noqa: E402
from jzero.plan.room import usable_bytes  # noqa: E402
from jzero.plan.times import times  # noqa: E402

MODELS = ("llama-8b", "llama-70b", "llama-405b")
PODS = {
    "v5p": ("4x4x4", "4x8x8", "8x8x16", "16x16x16"),
    "v6e": ("8x8", "16x16", "16x16*4", "16x16*16"),  # a v6e pod is 256 chips: larger ones are several slices
    "h100": ("8x8", "32x8", "128x8", "512x8"),
    "h200": ("8x8", "32x8", "128x8", "512x8"),
}
LENGTHS = (8192, 4096, 2048)
MOST_TOKENS = 64 * 2**20


class Run(NamedTuple):
    """A published run: what was said of it, and what of jzero's models comes nearest."""

    what: str
    model: str
    target: str
    seq: int
    batch: int | None  # sequences; None: not published, the fastest that fits
    tokens_per_s: float | None  # per device
    mfu: float | None
    source: str


MAXTEXT, RECIPES = "MaxText documentation, performance results", "AI-Hypercomputer/tpu-recipes"
NVIDIA, GPU_RECIPES = "NVIDIA JAX-Toolbox, MaxText page", "AI-Hypercomputer/gpu-recipes"
PUBLISHED = (
    Run("Llama 3.1 8B, v6e-8", "llama-8b", "v6e:2x4", 8192, 24, 7139, None, RECIPES),  # three sequences per device, 3.443 s
    Run("Llama 3.1 70B, v6e-32", "llama-70b", "v6e:4x8", 8192, None, 921, None, RECIPES),
    Run("Llama 3.1 405B, 256 v6e", "llama-405b", "v6e:16x16", 8192, None, None, 0.386, RECIPES),
    Run("Llama 2 70B, 512 v5p", "llama-70b", "v5p:8x8x8", 4096, None, 692, 0.654, MAXTEXT),
    Run("Llama 2 70B, 64 H100", "llama-70b", "h100:8x8", 4096, 128, 1036, 460 / 989.4, NVIDIA),
    Run("Llama 3 70B, 128 H100", "llama-70b", "h100:16x8", 8192, 256, 1052, 507 / 989.4, NVIDIA),
    Run("Llama 3.1 70B, 256 H200", "llama-70b", "h200:32x8", 8192, None, 1056, 508 / 989.4, GPU_RECIPES),
    Run("Llama 3.1 8B, 8 H100", "llama-8b", "h100:1x8", 8192, 16, 6667, None, "pytorch/torchtitan, FSDP and compile"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plans")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        (args.out / f"{model}.md").write_text(pods(model))
    (args.out / "README.md").write_text(readme())


def pods(model: str) -> str:
    """One model on every pod."""
    rows = [row(model, f"{device}:{grid}") for device, grids in PODS.items() for grid in grids]
    names = ("target", "devices", "tokens", "stage", "mesh", "sequences", "k", "remat", "peak", "of", "step", "tokens/s", "MFU")
    return PODS_TEXT.replace("MODEL", model).replace("TABLE", table(names, rows))


def row(model: str, target: str) -> tuple[str, ...]:
    """The fastest plan that fits a target, as cells."""
    count = facts.num_devices(make(model, target, seq=2048).parsed)
    for seq in LENGTHS:
        if best := fastest(model, target, seq):
            timed, peak = times(best), peak_of(best)
            mesh = " ".join(f"{axis}={size}" for axis, size in best.mesh.items())
            plan = (f"{seq:,}", str(best.stage), mesh, str(best.micro_sequences), str(best.accumulate), best.remat)
            room = (f"{peak / 1e9:.1f} GB", f"{usable_bytes(target) / 1e9:.1f} GB")
            return target, f"{count:,}", *plan, *room, *speed(timed)
    least = peak_of(make(model, target, seq=LENGTHS[-1]))
    room = (f"does not fit: {least / 1e9:.1f} GB", f"{usable_bytes(target) / 1e9:.1f} GB")
    return target, f"{count:,}", f"{LENGTHS[-1]:,}", "3", "data", "1", "1", "full", *room, "-", "-", "-"


def fastest(model: str, target: str, seq: int, batch: int | None = None, **held: Any) -> Job | None:
    """Of every candidate that fits, the one with most tokens per second, of those the smallest. `held`: remats, fused, axes."""
    job, fused = make(model, target, seq=seq, batch=batch, any_split=True), held.get("fused", False)
    every = search.candidates(job, vary_batch=batch is None)
    axes = held.get("axes", set())  # beside ZeRO's
    every = (one for one in every if set(one.mesh) - {"replica", "data"} == axes)
    wanted = [one for one in every if one.batch * seq <= MOST_TOKENS and one.remat in held.get("remats", one.remat)]
    fitting = [one for one in wanted if peak_of(one, fused=fused) <= usable_bytes(target)]
    return min(fitting, key=lambda one: (-times(one).tokens_per_s_per_device, peak_of(one, fused=fused)), default=None)


def peak_of(job: Job, *, fused: bool = False) -> int:
    """As the device would run it: on a GPU attention is fused; `fused`: as if it were on a TPU too."""
    return closed.memory(job, fused_attention=fused or not facts.is_tpu(job.parsed)).peak_bytes


def speed(timed: Any) -> tuple[str, str, str]:
    return f"{timed.step_s:.2f} s", f"{timed.tokens_per_s_per_device:,.0f}", f"{timed.mfu:.1%}"


def readme() -> str:
    """Published runs beside the roofline."""
    names = ("run", "tokens", "published", "MFU", "planned, remat full", "MFU", "ratio", "peak", "planned, fastest", "source")
    return README.replace("TABLE", table(names, [compared(run) for run in PUBLISHED]))


def compared(run: Run) -> tuple[str, ...]:
    """One published run and what the plan says of it, with the memory of fused attention, which all of them had."""
    said = (f"{run.tokens_per_s:,.0f}" if run.tokens_per_s else "-", f"{run.mfu:.1%}" if run.mfu else "-")
    full, best = (
        fastest(run.model, run.target, run.seq, run.batch, fused=True, remats=remats)
        for remats in (("full",), ("none", "dots", "full"))
    )
    if full is None or best is None:
        need = peak_of(make(run.model, run.target, seq=run.seq, batch=run.batch), fused=True)
        missing = f"does not fit: {need / 1e9:.1f} of {usable_bytes(run.target) / 1e9:.1f} GB"
        return run.what, f"{run.seq:,}", *said, "-", "-", "-", missing, "-", run.source
    timed = times(full)
    ratio = timed.tokens_per_s_per_device / run.tokens_per_s if run.tokens_per_s else timed.mfu / (run.mfu or 1)
    memory = f"{peak_of(full, fused=True) / 1e9:.1f} of {usable_bytes(run.target) / 1e9:.1f} GB"
    rates = f"{times(best).tokens_per_s_per_device:,.0f} ({best.remat})"
    return run.what, f"{run.seq:,}", *said, *speed(timed)[1:], f"{ratio:.2f}", memory, rates, run.source


PODS_TEXT = """# Plans: MODEL

Made by `python benchmarks/plans.py`; per device, closed form, bf16. `tokens`: of a sequence; `sequences`: per device and
microbatch; `k`: microbatches a step; `of`: what a program can have. Sequences are 8,192 tokens where anything fits, else the
longest of 4,096 and 2,048 that does. Speeds are a roofline: see [the comparison](README.md).

TABLE
"""
README = """# Plans for Llama on pods of 64 to 4,096 devices

Made by `python benchmarks/plans.py`: [8B](llama-8b.md), [70B](llama-70b.md), [405B](llama-405b.md) on v5p, v6e, H100 and
H200; [which axes when](axes.md), [one H100 with offload](offload.md). Each row is the fastest combination that fits by the
closed form, for at most 64M tokens a batch.

## Beside published runs

Tokens per second and device. `ratio` is planned over published speed, both with the layers' forward pass computed again, as
most such runs do; beside it what the plan would choose. The published figures are those of `PUBLISHED` in the script. None of
them gives memory, so the plan's memory can only be held against the fact that the run existed.

TABLE

Where they part, and why:

- **Planned is faster, by 1.1 to 1.3 on large runs.** The roofline takes 80% of the peak for every product and nothing for
  what is no product: norms, rotation, the softmax of attention, exposed collectives, input, stragglers. torchtitan's 8B run
  has a batch of two sequences on eight GPUs and the least tuning of these.
- **Llama 2 70B on v5p is slower with everything computed again**, so the published run does not: with the products saved
  (`dots`) the plan is ahead again, by 1.13.
- **70B on 32 and 405B on 256 v6e do not fit.** ZeRO alone keeps a layer whole, gathered and its gradient, and the logits of a
  whole sequence. The recipes of these runs name a remat policy of their own (`custom`); what they offload or split besides was
  not looked up. The 405B run on v5p that is published with 124.6 tokens/s does not say on how many chips in the text at hand,
  so it is left out.
- **TPUs in jzero today.** The comparison counts fused attention's memory everywhere, because the published runs had it. The
  pods' tables do not: jzero's models have plain attention on TPUs, whose scores take 6 bytes for each pair of tokens and head
  in bf16: 13 GB for 8B, 26 GB for 70B and 52 GB for 405B at 8,192 tokens. A plan may not promise what the program does not
  do.
- **Several v6e slices** are planned with collectives in which each chip carries its part over the data-centre network. Not
  measured.
- **Llama 2 70B** is planned with Llama 3's vocabulary (128,256 rows and not 32,000), 1.1% more parameters that multiply.
- MFU uses `jzero.models.FLOPS_FORMULA`, which counts the masked half of attention too; sources differ in that.
"""


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
