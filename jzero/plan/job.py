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
from jzero.plan import facts
from jzero.topology import Target, parse

WHO = "jzero.plan"
AXES = ("replica", "data")  # that planned models are split over
_VOCAB_MULTIPLE = 128  # as the bench pads: 50304 divides where 50257 does not
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


class Job(NamedTuple):
    """One training run to plan. `batch` is sequences per step over all devices."""

    model: str
    target: str
    stage: int
    mesh: dict[str, int]  # replica and data
    seq: int
    batch: int
    precision: str
    accumulate: int
    remat: str

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
    def micro_sequences(self) -> int:
        """Sequences per device and microbatch."""
        return self.batch // (self.num_devices * self.accumulate)

    @property
    def micro_tokens(self) -> int:
        return self.micro_sequences * self.seq

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


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
) -> Job:
    """A job with defaults: all devices on `data`, the model's length up to 8,192, one sequence per device and microbatch.

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
    length = seq or min(config.max_seq, 8192)
    if length > config.max_seq:
        fix = f"Use --seq {config.max_seq} or another model."
        raise ValueError(
            explain(WHO, f"{model} has sequences of at most {config.max_seq} tokens", found=[f"--seq {length}"], fix=fix)
        )
    multiple = facts.num_devices(parsed) * accumulate
    sequences = _batch(batch, tokens_per_batch, length, multiple, sizes, accumulate)
    return Job(model, target, stage, sizes, length, sequences, precision, accumulate, remat)


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
        fix = "Use data (sharded over) and replica (repeated over)."
        raise ValueError(explain(WHO, "the planned models split over replica and data only", found=found, fix=fix))
    replica = asked.get("replica", num_devices // asked["data"] if "data" in asked else 1)
    data = asked.get("data", num_devices // replica if replica else 0)
    if replica * data != num_devices or num_devices == 0:
        found = [f"{axis}={size}" for axis, size in asked.items()]
        legal = [f"replica={one},data={num_devices // one}" for one in divisors(num_devices)[:6]]
        fix = f"Use --mesh {' or '.join(legal)}."
        raise ValueError(
            explain(WHO, f"the mesh does not multiply to the {num_devices} devices of {target}", found=found, fix=fix)
        )
    return {"replica": replica, "data": data} if replica > 1 else {"data": data}


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
