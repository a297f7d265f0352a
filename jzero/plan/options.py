"""The plan's command line, checked before anything is computed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jzero import mesh as meshes
from jzero._errors import explain
from jzero.offload import Offload
from jzero.plan import names
from jzero.plan.names import WHO

_EPILOG = "Either --model, or FILE.py:step of a module with `step`, `state` and `window` or `batch`. See docs/plan.md."


class Options(NamedTuple):
    """What was asked for."""

    step: str | None  # FILE.py:name
    model: str | None
    target: str
    stage: int | None
    mesh: dict[str, int]
    seq: int | None
    batch: int | None
    tokens_per_batch: int | None
    precision: str
    accumulate: int
    remat: str | None
    schedule: str | None
    offload: Offload | None
    host_memory: int | None
    disk: int | None
    disk_bandwidth: int | None
    closed_form_only: bool
    search: bool
    compile_best: int
    price: float | None
    memory_limit: float | None
    json: str | None


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from command-line words.

    Raises:
      ValueError: words that mean nothing together.
      SystemExit: `--help`, or words that argparse does not know.
    """
    asked = vars(_parser().parse_args(argv))
    asked["mesh"] = meshes.parse(asked["mesh"], who=WHO)
    readers = dict.fromkeys(("seq", "tokens_per_batch"), names.count)
    readers |= dict.fromkeys(("host_memory", "disk", "disk_bandwidth"), names.num_bytes) | {"offload": names.offload}
    for name, read in readers.items():
        asked[name] = None if asked[name] is None else read(asked[name])
    options = Options(**asked)
    if (options.model is None) == (options.step is None):
        fix = (
            "python -m jzero.plan --model llama-8b --target v5p:4x4x4, or python -m jzero.plan train.py:step --target h100:2x8."
        )
        raise ValueError(
            explain(WHO, "one thing to plan: --model, or FILE.py:step", found=[f"{options.model=}, {options.step=}"], fix=fix)
        )
    if options.step is not None:
        split_step(options.step)
        _check_effect(options)
    amounts = {"--price": options.price, "--memory-limit": options.memory_limit, "--compile-best": options.compile_best + 1}
    wrong = [f"{name} {amount}" for name, amount in amounts.items() if amount is not None and not 0 < amount < float("inf")]
    if wrong:
        raise ValueError(explain(WHO, "amounts must be positive", found=wrong, fix="Leave them out to get the defaults."))
    return options


def _check_effect(options: Options) -> None:
    """A step of one's own says itself what rests where; and its file is what is compiled, whatever the host has."""
    idle = {"--offload": options.offload, "--host-memory": options.host_memory, "--disk": options.disk}
    found = [f"{name} with {options.step}" for name, value in idle.items() if value is not None]
    if found:
        fix = "Write jzero.shard(..., offload=jzero.Offload(...)) in the file; these words go with --model."
        raise ValueError(explain(WHO, "a setting would have no effect", found=found, fix=fix))


def split_step(words: str) -> tuple[Path, str]:
    """`"train.py:step"` -> (its path, "step")."""
    file, _, name = words.rpartition(":")
    if not file or not name.isidentifier() or not Path(file).is_file():
        problem, fix = "FILE.py:NAME, a file that exists and a name in it", "For example examples/dict.py:step."
        raise ValueError(explain(WHO, problem, found=[f"{words!r}"], fix=fix))
    return Path(file), name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jzero.plan", description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("step", nargs="?", metavar="FILE.py:step", help="your own step; the module is run, in a process of its own")
    add(
        "--model",
        help="gpt2-124m/355m/774m/1.5b, llama-1b/8b/70b/405b, mixtral-8x7b; with fields replaced llama-8b,num_layers=40",
    )
    add("--target", required=True, help="v5p:16x16x16, v5e:16x16*2 (two slices), h100:2x8 (hosts x devices)")
    add("--stage", type=int, choices=range(4), help="ZeRO stage; default 3, or the step's own")
    add(
        "--mesh",
        default="",
        help="sizes of axes, such as data=8,replica=2, sequence=4 or pipe=4,tensor=8; the rest is data",
    )
    add("--seq", help="tokens per sequence; default the model's, up to 8192")
    add("--batch", type=int, help="sequences per step over all devices; default one per device and microbatch")
    add("--tokens-per-batch", help="the same in tokens; k, M and G are powers of 1,024")
    add("--precision", default="bf16", help="fp32, bf16, fp16 or bf16-pure")
    add("--accumulate", type=int, default=1, help="microbatches per step")
    add("--remat", help="none, full or dots: what the backward pass computes again, per layer; default full")
    add("--schedule", help="of a pipeline: gpipe, 1f1b, interleaved, zb_h1 or breadth_first; default 1f1b")
    add(
        "--offload",
        help="opt_state=host,params=host,activations=host,fraction=0.8, or opt_state=nvme:/data/swap,params=nvme:/data/swap; "
        "fetch=use: parameters in host memory layer by layer",
    )
    add("--host-memory", help="of one host, such as 128GB; default the target's (jzero/plan/hosts.py)")
    add("--disk", help="of one host's drives, such as 4TB; default the target's")
    add("--disk-bandwidth", help="bytes per second of a host's drives, reads and writes together, such as 6GB")
    add("--closed-form-only", action="store_true", help="compile nothing: an answer within a second")
    add(
        "--search",
        action="store_true",
        help="try stage, mesh (all axes), microbatch, accumulate, remat and offload; compile the best few",
    )
    add("--compile-best", type=int, default=2, help="how many candidates of a search to compile")
    add("--price", type=float, help="dollars per device and hour: adds dollars per 1e9 tokens")
    add(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="this machine's, for the compilers; default most of what is free",
    )
    add("--json", metavar="FILE", help="write the plan")
    return parser
