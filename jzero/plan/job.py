"""What is planned, as a value with every default filled in and checked before anything is computed."""

import math
import re
from functools import cache
from typing import Any, NamedTuple

from jzero import precision as precisions
from jzero import remat as remats
from jzero import stages
from jzero._errors import explain, suggest
from jzero.models import MixtralConfig, ModelConfig, preset
from jzero.pipeline import schedules
from jzero.plan import facts
from jzero.plan.shapes import tensor_sizes
from jzero.topology import Target, parse

WHO = "jzero.plan"
_VOCAB_MULTIPLE = 128  # as the bench pads: 50304 divides where 50257 does not
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
AXES = ("replica", "data", "pipe", "tensor")  # that the planned models can be split over, in the mesh's order
SCHEDULE = "1f1b"  # of pipelines, unless one is named


class Job(NamedTuple):
    """One training run to plan. `batch` is sequences per step over all devices."""

    model: str
    target: str
    stage: int
    mesh: dict[str, int]  # axis -> size, of AXES
    seq: int
    batch: int
    precision: str
    accumulate: int
    remat: str
    schedule: str | None = None  # of a pipeline

    @property
    def config(self) -> ModelConfig:
        return _padded(self.model)

    @property
    def parsed(self) -> Target:
        return parse(self.target)

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def data(self) -> int:
        return self.mesh.get("data", 1)

    @property
    def replica(self) -> int:
        return self.mesh.get("replica", 1)

    @property
    def tensor(self) -> int:
        return self.mesh.get("tensor", 1)

    @property
    def pipe(self) -> int:
        return self.mesh.get("pipe", 1)

    @property
    def num_shards(self) -> int:
        """Over how many parts the batch is split: replica x data. The devices of other axes share a part."""
        return self.replica * self.data

    @property
    def micro_sequences(self) -> int:
        """Sequences per device and microbatch."""
        return self.batch // (self.num_shards * self.accumulate)

    @property
    def micro_tokens(self) -> int:
        return self.micro_sequences * self.seq

    def to_dict(self) -> dict[str, Any]:
        """Without the schedule where there is no pipeline."""
        return {name: value for name, value in self._asdict().items() if name != "schedule" or value is not None}


@cache
def _padded(model: str) -> ModelConfig:
    """The preset with its vocabulary padded; a search asks thousands of times."""
    config = preset(model)
    return preset(model, padded_vocab_size=math.ceil(config.vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)


def make(
    model: str,
    target: str,
    *,
    stage: int = 3,
    mesh: dict[str, int] | None = None,
    seq: int | None = None,
    batch: int | None = None,
    tokens_per_batch: int | None = None,
    precision: str = "bf16",
    accumulate: int = 1,
    remat: str = "full",
    schedule: str | None = None,
    any_split: bool = False,
) -> Job:
    """A job with defaults: devices that no other axis takes on `data`, the model's length up to 8,192, one sequence per device
    and microbatch, 1F1B for a pipeline. `any_split`: the batch need not divide over this mesh, for a search tries others.

    Raises:
      ValueError: an unknown name (with suggestions), or sizes that do not divide (with those that would).
    """
    config, parsed = preset(model), parse(target)
    if isinstance(config, MixtralConfig):
        fix = "jzero.plan(step, state, *batch, target=...) compiles a step of your own, experts and all."
        found = [f"--model {model}: {config.num_experts} experts"]
        raise NotImplementedError(explain(WHO, "the closed form knows no experts", found=found, fix=fix))
    stages.get(stage)
    precisions.get(precision)
    remats.get(remat)
    _check_counts(seq=seq, batch=batch, tokens_per_batch=tokens_per_batch, accumulate=accumulate)
    sizes = _mesh(mesh or {}, facts.num_devices(parsed), target)
    _check_axes(model, preset(model), sizes, accumulate, schedule)
    length = seq or min(config.max_seq, 8192)
    if length > config.max_seq:
        fix = f"Use --seq {config.max_seq} or another model."
        raise ValueError(
            explain(WHO, f"{model} has sequences of at most {config.max_seq} tokens", found=[f"--seq {length}"], fix=fix)
        )
    multiple = sizes.get("replica", 1) * sizes["data"] * accumulate
    multiple = 1 if any_split and (batch or tokens_per_batch) else multiple
    sequences = _batch(batch, tokens_per_batch, length, multiple, sizes, accumulate)
    schedule = (schedule or SCHEDULE) if sizes.get("pipe", 1) > 1 else None
    return Job(model, target, stage, sizes, length, sequences, precision, accumulate, remat, schedule)


def count(text: str) -> int:
    """`"64M"` -> 67108864: k, M and G are powers of 1,024, as sequence lengths are."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", text.strip().lower().replace(",", "").replace("_", ""))
    number = float(match[1]) * _UNITS[match[2]] if match else 0
    if not match or number != int(number):
        fix = "Write a whole number, or one with k, M or G (powers of 1,024): 4194304, 4M."
        raise ValueError(explain(WHO, "not a number of tokens", found=[f"{text!r}"], fix=fix))
    return int(number)


def _check_counts(**counts: int | None) -> None:
    wrong = [f"{name}={value}" for name, value in counts.items() if value is not None and value < 1]
    if wrong:
        raise ValueError(explain(WHO, "counts must be positive", found=wrong, fix="Leave them out to get the defaults."))


def _mesh(asked: dict[str, int], num_devices: int, target: str) -> dict[str, int]:
    unknown = [axis for axis in asked if axis not in AXES]
    if unknown:
        found = [f"{axis}={asked[axis]}: {suggest(axis, AXES)}" for axis in unknown]
        fix = "Use data (sharded over), replica (repeated over), tensor (each layer split) and pipe (layers split)."
        raise ValueError(explain(WHO, f"the planned models split over {', '.join(AXES)}", found=found, fix=fix))
    sizes = {axis: asked.get(axis, 1) for axis in AXES}
    apart = sizes["pipe"] * sizes["tensor"]
    left = num_devices // apart if apart else 0
    if "replica" not in asked and "data" in asked:
        sizes["replica"] = left // asked["data"] if asked["data"] else 0
    if "data" not in asked:
        sizes["data"] = left // sizes["replica"] if sizes["replica"] else 0
    if math.prod(sizes.values()) != num_devices or num_devices == 0:
        found = [f"{axis}={size}" for axis, size in asked.items()]
        fits = apart > 0 and num_devices % apart == 0
        others = "".join(f",{axis}={sizes[axis]}" for axis in ("pipe", "tensor") if sizes[axis] > 1 and fits)
        of = left if others else num_devices
        legal = [f"replica={one},data={of // one}{others}" for one in divisors(of)[:6]]
        fix = f"Use --mesh {' or '.join(legal)}."
        raise ValueError(
            explain(WHO, f"the mesh does not multiply to the {num_devices} devices of {target}", found=found, fix=fix)
        )
    return {axis: size for axis, size in sizes.items() if size > 1 or axis == "data"}


def _check_axes(model: str, config: ModelConfig, mesh: dict[str, int], accumulate: int, schedule: str | None) -> None:
    """Heads for `tensor`, layers and microbatches for `pipe`, and a pipeline for the schedule."""
    tensor, pipe = mesh.get("tensor", 1), mesh.get("pipe", 1)
    if tensor > 1 and tensor not in tensor_sizes(_padded(model)):
        legal = ", ".join(map(str, tensor_sizes(_padded(model))[1:])) or "none"
        fix = f"Legal sizes of axis 'tensor' are {legal}."
        raise ValueError(explain(WHO, f"axis 'tensor' does not divide {model}'s heads", found=[f"tensor={tensor}"], fix=fix))
    if schedule is not None and pipe == 1:
        fix = "Leave --schedule out, or give the mesh a pipe axis: --mesh pipe=4."
        raise ValueError(explain(WHO, "a schedule needs a pipeline", found=[f"--schedule {schedule}, no axis 'pipe'"], fix=fix))
    if pipe == 1:
        return
    if pipe > config.num_layers:
        fix = f"Use at most pipe={config.num_layers}."
        raise ValueError(explain(WHO, f"{model} has {config.num_layers} layers", found=[f"pipe={pipe}"], fix=fix))
    schedules.get(schedule or SCHEDULE, pipe, accumulate, who=WHO)  # raises on unknown names and too few microbatches


def divisors(number: int) -> list[int]:
    """Small ones first."""
    return [one for one in range(1, number + 1) if number % one == 0]


def _batch(batch: int | None, tokens: int | None, seq: int, multiple: int, mesh: dict[str, int], accumulate: int) -> int:
    context = f"mesh {mesh}; accumulate {accumulate}; seq {seq}"
    if batch is not None and tokens is not None and batch * seq != tokens:
        found = [f"--batch {batch} sequences of {seq} are {batch * seq} tokens", f"--tokens-per-batch {tokens}"]
        raise ValueError(explain(WHO, "two sizes of the batch that differ", found=found, fix="Give one of them."))
    if batch is None and tokens is None:
        return multiple
    wanted = batch * seq if batch is not None else tokens or 0
    if wanted % (multiple * seq):
        step = multiple * seq
        legal = [size for size in (wanted // step * step, math.ceil(wanted / step) * step) if size]
        found = [f"{wanted} tokens: {wanted / seq:g} sequences"]
        fix = f"Use {' or '.join(f'{size} tokens ({size // seq} sequences)' for size in legal)}."
        problem = f"the batch must be a multiple of {multiple} sequences: devices times accumulate"
        raise ValueError(explain(WHO, problem, found=found, context=context, fix=fix))
    return wanted // seq
