"""What is planned, as a value with every default filled in and checked before anything is computed."""

import math
from functools import cache
from typing import Any, Literal, NamedTuple

from jzero import precision as precisions
from jzero import remat as remats
from jzero import stages
from jzero._errors import explain
from jzero.models import ModelConfig
from jzero.offload import Offload
from jzero.offload.asked import NVME
from jzero.plan import at_use, facts, names, sizes
from jzero.plan.names import WHO as WHO
from jzero.plan.names import config_of, padded
from jzero.plan.names import count as count
from jzero.plan.names import divisors as divisors
from jzero.plan.shapes import Zero
from jzero.plan.sizes import AXES as AXES
from jzero.plan.sizes import BATCH_AXES
from jzero.plan.sizes import SCHEDULE as SCHEDULE
from jzero.topology import Target, parse

_parsed = cache(parse)  # a search asks thousands of times


class Job(NamedTuple):
    """One training run to plan. `batch` is sequences per step over all devices."""

    model: str  # a preset's name, with fields replaced: `names.config_of`
    target: str
    stage: int
    mesh: dict[str, int]  # axis -> size, of AXES
    seq: int
    batch: int
    precision: str
    accumulate: int
    remat: str
    schedule: str | None = None  # of a pipeline
    offload: Offload | None = None
    host_memory: int | None = None  # bytes of a host; None: the target's (`hosts`), as below
    disk: int | None = None  # bytes of a host's drives
    disk_bandwidth: int | None = None  # bytes per second of a host's drives, reads and writes together

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Job":
        """The reverse of `to_dict`."""
        offload = fields.get("offload")
        return cls(**fields | {"offload": Offload(**offload)}) if offload else cls(**fields)

    @property
    def config(self) -> ModelConfig:
        return padded(self.model)

    @property
    def parsed(self) -> Target:
        return _parsed(self.target)

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
    def sequence(self) -> int:
        return self.mesh.get("sequence", 1)

    @property
    def expert(self) -> int:
        return self.mesh.get("expert", 1)

    @property
    def zero(self) -> Zero:
        """The axes that ZeRO shards over."""
        get = self.mesh.get
        return Zero(get("data", 1), get("expert", 1), get("sequence", 1))

    @property
    def num_shards(self) -> int:
        """Over how many parts the batch is split: replica x data x expert. The devices of other axes share a part."""
        return math.prod(self.mesh.get(axis, 1) for axis in BATCH_AXES)

    @property
    def micro_sequences(self) -> int:
        """Sequences per device and microbatch; devices of `sequence` share them."""
        return self.batch // (self.num_shards * self.accumulate)

    @property
    def micro_tokens(self) -> int:
        """Tokens per device and microbatch."""
        return self.micro_sequences * self.seq // self.sequence

    @property
    def attention_kind(self) -> Literal["ulysses", "ring"]:
        """How attention meets a split sequence: by an exchange of heads where these divide, else by a ring."""
        return "ulysses" if (self.config.num_heads // self.tensor) % self.sequence == 0 else "ring"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without what is not asked for."""
        found = {name: value for name, value in self._asdict().items() if value is not None}
        return found | ({"offload": names.fields_of(self.offload)} if self.offload else {})

    def program(self) -> dict[str, Any]:
        """What the compiled program follows from: no budgets, and no folder's name."""
        offload = self.offload
        if offload is not None:
            folder = f"{NVME}:swap"
            fields: dict[str, Any] = names.fields_of(offload) | dict.fromkeys(_in_files(offload), folder)
            offload = Offload(**fields)
        return self._replace(host_memory=None, disk=None, disk_bandwidth=None, offload=offload).to_dict()


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
    remat: str | None = None,
    schedule: str | None = None,
    offload: Offload | None = None,
    host_memory: int | None = None,
    disk: int | None = None,
    disk_bandwidth: int | None = None,
    any_split: bool = False,
) -> Job:
    """A job with defaults: devices that no other axis takes on `data`, the model's length up to 8,192, one sequence per device
    and microbatch, 1F1B for a pipeline, remat "full" (where activations go to the host "dots", which says which of them do).
    `any_split`: the batch need not divide over this mesh, for a search tries others.

    Raises:
      ValueError: an unknown name (with suggestions), or sizes that do not divide (with those that would).
      NotImplementedError: mixes that jzero does not have.
    """
    config, parsed = config_of(model), parse(target)
    remat = remat or ("dots" if offload is not None and offload.activations else "full")
    stages.get(stage)
    precisions.get(precision)
    remats.get(remat)
    sizes.counts(seq=seq, batch=batch, tokens_per_batch=tokens_per_batch, accumulate=accumulate)
    sizes.counts(host_memory=host_memory, disk_bandwidth=disk_bandwidth)
    axes = sizes.mesh(mesh or {}, facts.num_devices(parsed), target)
    length = seq or min(config.max_seq, 8192)
    sizes.axes(model, axes, length, accumulate, schedule)
    _check_offload(offload, axes, remat, disk_bandwidth)
    if length > config.max_seq:
        fix = f"Use --seq {config.max_seq} or another model."
        raise ValueError(
            explain(WHO, f"{model} has sequences of at most {config.max_seq} tokens", found=[f"--seq {length}"], fix=fix)
        )
    multiple = math.prod(axes.get(axis, 1) for axis in BATCH_AXES) * accumulate
    multiple = 1 if any_split and (batch or tokens_per_batch) else multiple
    sequences = sizes.batch(batch, tokens_per_batch, length, multiple, axes, accumulate)
    schedule = (schedule or SCHEDULE) if axes.get("pipe", 1) > 1 else None
    job = Job(
        model, target, stage, axes, length, sequences, precision, accumulate, remat, schedule, offload, host_memory, disk,
        disk_bandwidth,
    )  # fmt: skip
    if error := at_use.refusal(job):
        raise error
    return job


def _in_files(offload: Offload) -> list[str]:
    """The roles that rest on a drive."""
    return [role for role in ("opt_state", "params") if (place := offload.place_of(role)) and place.kind == NVME]


def _check_offload(offload: Offload | None, axes: dict[str, int], remat: str, disk_bandwidth: int | None) -> None:
    """What `jzero.shard` would refuse, and a setting without effect."""
    if disk_bandwidth is not None and not (offload and _in_files(offload)):
        found, fix = [f"--disk-bandwidth {disk_bandwidth}"], "Add --offload opt_state=nvme:FOLDER, or leave it out."
        raise ValueError(explain(WHO, "a setting would have no effect", found=found, fix=fix))
    if offload is None or offload.activations is None:
        return
    if remat != "dots":
        found, fix = [f"activations=host with --remat {remat}"], "Leave --remat out, or write --remat dots."
        raise ValueError(explain(WHO, "the host holds what dots saves", found=found, fix=fix))
    if axes.get("pipe", 1) > 1:
        found, fix = [f"pipe={axes['pipe']}, activations=host"], "Leave pipe out of the mesh, or use --remat full."
        raise NotImplementedError(explain(WHO, "a pipeline saves no activations in host memory", found=found, fix=fix))
