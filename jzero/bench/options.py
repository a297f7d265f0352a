"""The bench's command line, checked before anything is allocated."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from jzero import mesh as meshes
from jzero import precision as precisions
from jzero import remat as remats
from jzero import stages
from jzero._errors import explain, suggest
from jzero._types import MESH_AXES
from jzero.models import MixtralConfig, preset

WHO = "jzero.bench"
_EPILOG = "With no accelerator 8 CPU devices are simulated. Absolute times are comparable within one run only."


class Options(NamedTuple):
    """What was asked for. None: chosen when the devices are known (`setup.resolve`)."""

    model: str
    stages: tuple[int, ...]
    plain: bool
    mesh: dict[str, int]
    devices: int | None
    precision: str | None
    batch: int | None
    seq: int | None
    accumulate: int | None
    remat: str | None
    steps: int
    learning_rate: float
    seed: int
    data: str | None
    json: str | None
    plot: str | None


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from command-line words.

    Raises:
        ValueError: a value that means nothing, with a suggestion.
        SystemExit: `--help`, or words that argparse does not know.
    """
    asked = vars(_parser().parse_args(argv))
    asked["stages"], asked["mesh"] = parse_stages(asked.pop("stage")), parse_mesh(asked["mesh"])
    asked["plain"] = not asked.pop("no_plain")
    options = Options(**asked)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jzero.bench", description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add(
        "--model", default="gpt2-tiny", help="gpt2-tiny, gpt2-124m/355m/774m/1.5b, llama-tiny/1b/8b/70b/405b, mixtral-tiny/8x7b"
    )
    add("--stage", default="0,1,2,3", help="ZeRO stages to run, comma-separated")
    add("--no-plain", action="store_true", help="leave out plain JAX (hand-written jit, everything replicated)")
    add("--mesh", default="", help="sizes of mesh axes, such as pipe=2,data=2,tensor=2; default: all devices on data")
    add("--devices", type=int, help="how many CPU devices to simulate, or how many of the real ones to use")
    add("--precision", help="fp32, bf16, fp16 or bf16-pure; default fp32 on CPU, bf16 elsewhere")
    add("--batch", type=int, help="sequences per step over all devices; default 2 (CPU) or 8 per device and microbatch")
    add("--seq", type=int, help="tokens per sequence; default 128 (CPU) or 1024")
    add("--accumulate", type=int, help="microbatches per step; default 1, with pipe twice its size")
    add("--remat", help="none, full or dots: what the backward pass computes again, per layer")
    add("--steps", type=int, default=20)
    add("--learning-rate", type=float, default=1e-3, help="AdamW, after a short linear warmup")
    add("--seed", type=int, default=0)
    add("--data", metavar="FILE", help="UTF-8 text, or token ids as .npy or .bin; default: Python's documentation")
    add("--json", metavar="FILE", help="write the figures")
    add("--plot", metavar="FILE", help="write a picture (PNG)")
    return parser


def parse_stages(text: str) -> tuple[int, ...]:
    """`"0,3"` -> (0, 3)."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not word.isdigit() or int(word) not in stages.STAGES]
    if wrong:
        known = ", ".join(map(str, stages.STAGES))
        fix = "Write --stage 0,1,2,3, or leave some out."
        raise ValueError(explain(WHO, f"stages are {known}", found=[f"--stage {text}: {word!r}" for word in wrong], fix=fix))
    return tuple(dict.fromkeys(map(int, words)))


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=4,replica=2"` -> {"data": 4, "replica": 2}, of the axes that the bench's models are split over."""
    mesh = meshes.parse(text, who=WHO)
    unknown = [axis for axis in mesh if axis not in MESH_AXES]
    if unknown:
        context = suggest(unknown[0], MESH_AXES)
        fix = f"Use {', '.join(MESH_AXES)}."
        raise ValueError(
            explain(WHO, "unknown mesh axis", found=[f"--mesh {text}: {a!r}" for a in unknown], context=context, fix=fix)
        )
    return mesh


def _check(options: Options) -> None:
    """Everything that can be known without a device."""
    config = preset(options.model)
    if options.mesh.get("expert", 1) > 1 and not isinstance(config, MixtralConfig):
        found, fix = [f"--mesh expert={options.mesh['expert']}"], "Use --model mixtral-tiny, or give its devices to data."
        raise ValueError(explain(WHO, f"{options.model} has no experts", found=found, fix=fix))
    if options.precision is not None:
        precisions.get(options.precision)
    remats.get(options.remat)
    counts = {name: getattr(options, name) for name in ("devices", "batch", "seq", "accumulate", "steps")}
    wrong = [f"--{name} {count}" for name, count in counts.items() if count is not None and count < 1]
    if wrong:
        raise ValueError(explain(WHO, "counts must be positive", found=wrong, fix="Leave them out to get the defaults."))
    if not options.stages and not options.plain:
        raise ValueError(explain(WHO, "nothing to run", found=["no stage, and --no-plain"], fix="Name a stage: --stage 3."))
