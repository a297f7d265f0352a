"""The closed form: what a step of a model needs and moves, from its config alone. Nothing is traced; it takes milliseconds.

Temporaries are the largest of three moments of the step (`jzero.plan.moments`); `docs/plan.md` says how far they were off.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from jzero import stages
from jzero.audit import moved
from jzero.models import GPT2Config, MixtralConfig, ModelConfig
from jzero.plan import at_use, exchanges, moments, offloads, pipelines
from jzero.plan.job import BATCH_AXES, Job
from jzero.plan.shapes import EXPERTS, Leaf, Split, leaves

# Sums of activations over `tensor`, per layer and microbatch: two forward (after the second product of attention and MLP), two
# backward (into the first ones, added up before they are sent), and where the layer is computed again attention's once more.
_SUMS = {"none": 4, "dots": 4, "full": 5}
_SUMS_OUTSIDE = 2  # the embedding's rows, looked up in pieces of the vocabulary; the head's gradient of its input


class Memory(NamedTuple):
    """Bytes per device."""

    at_rest: dict[str, int]  # role -> bytes: params, opt_state, batch
    live: dict[str, int]  # the parts of the moment that needs most
    moment: str  # "head", "backward", "layer" or "update"

    @property
    def temp_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_rest.values()) + self.temp_bytes

    @property
    def parts(self) -> dict[str, int]:
        """Everything that makes the peak, the largest first."""
        named = {f"{role} at rest": size for role, size in self.at_rest.items()} | self.live
        return dict(sorted(named.items(), key=lambda item: -item[1]))


def memory(job: Job, *, fused_attention: bool = False) -> Memory:
    """Bytes at rest by role, and the temporaries of the moment that needs most.

    `fused_attention`: as on a GPU, whose cuDNN kernel writes no scores; what is compiled without a GPU writes them.
    """
    rest = {role: sum(sizes) for role, sizes in offloads.resting(job).items()}
    rest["batch"] = 4 * job.accumulate * job.micro_sequences * (job.seq + 1)
    away = offloads.away(job)
    leaving = away.uses.leaves if away else frozenset()
    found_moments = moments.moments(job, fused_attention=fused_attention, leaving=leaving)
    if away:
        found_moments = at_use.moments(job, pipelines.held(job), leaving, found_moments)
        rest = {role: size - away.gone.get(role, 0) for role, size in rest.items()}
        found_moments = offloads.moments(job, away, found_moments)
    name = max(found_moments, key=lambda one: sum(found_moments[one].values()))
    return Memory(rest, {part: amount for part, amount in found_moments[name].items() if amount}, name)


def wire(job: Job) -> dict[str, dict[str, int]]:
    """Axis -> kind -> bytes per device and step, with the ring algorithm; DESIGN's table of stages, leaf by leaf."""
    size = moments.sizes(job)
    if job.pipe > 1:
        table = pipelines.costs(job, moments.saved(job, size))[1]
    else:
        table = _zero(job, size, leaves(job.config, job.tensor, job.expert))
        for axis, kinds in exchanges.wire(job, size.compute).items():
            own = table.setdefault(axis, {})
            own.update({kind: own.get(kind, 0) + amount for kind, amount in kinds.items()})
    if job.tensor > 1:
        # Of one device's layers; a microbatch meets both ends once, whatever the number of pipe stages.
        sums = _SUMS[job.remat] * pipelines.rows_of(job) + _SUMS_OUTSIDE
        activation = size.compute * job.micro_tokens * job.config.dim
        table["tensor"] = {"all-reduce": moved("all-reduce", activation * sums * job.accumulate, job.tensor)}
    return table


def _zero(job: Job, size: moments.Sizes, found: Sequence[Leaf]) -> dict[str, dict[str, int]]:
    """What ZeRO moves of one device's pieces: the formula of `jzero.traffic`, leaf by leaf."""
    stage, k = stages.get(job.stage), job.accumulate
    table: dict[str, dict[str, int]] = {}

    def add(names: Sequence[str], kind: str, amount: int) -> None:
        present = [axis for axis in job.mesh if axis in names and job.mesh[axis] > 1]
        members = math.prod(job.mesh[axis] for axis in present)
        if members > 1 and amount:
            kinds = table.setdefault("+".join(present), {})
            kinds[kind] = kinds.get(kind, 0) + moved(kind, amount, members)

    once = stage.reduce == "step"
    for leaf in found:
        split = leaf.split(job.zero) if stage.gather != "never" else Split()
        total = leaf.size * leaf.repeats
        piece = total // split.over_sequence  # what `data` gathers and reduces
        gathered = piece * (k * (2 if leaf.is_layer else 1) if stage.gather == "use" else 1 if stage.gather == "step" else 0)
        reduced = piece * (1 if once else k)
        if split.over_sequence > 1:  # gathered behind `data`; added up in every microbatch
            whole, is_table = size.compute * split.over_sequence, leaf.name == "wte"
            is_tied = is_table and not _lookups(job.config)
            # A table that is a head too is gathered for each use, and its gradients meet whole. Of one that is only looked up
            # the gradient's rows travel (`exchanges`), and each device makes its own part of it.
            add(["sequence"], "all-gather", whole * gathered * (2 if is_tied else 1))
            kind = "all-reduce" if is_tied else "reduce-scatter"
            add(["sequence"], kind, 0 if is_table and not is_tied else whole * reduced * (k if once else 1))
        else:
            add(["sequence"], "all-reduce", size.compute * piece * k)
        add(split.axes, "all-gather", size.compute * gathered)
        add(split.axes, "reduce-scatter", (size.reduce_once if once else size.reduce) * reduced)
        rest = [axis for axis in BATCH_AXES if axis not in split.axes and not (axis == "expert" and leaf.is_experts)]
        add(rest, "all-reduce", size.reduce_once * piece // split.num)
    return table


@cache
def flops_per_token(config: ModelConfig, seq: int) -> float:
    """6 N + 12 L d T, as the models and every published MFU count: `jzero.models.FLOPS_FORMULA`."""
    padding = (getattr(config, "padded_vocab_size", None) or config.vocab_size) - config.vocab_size
    count = sum(_used(leaf, config) * leaf.repeats for leaf in leaves(config) if leaf.name not in ("wpe", *_lookups(config)))
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * (count - padding * config.dim) + attention * seq


def _used(leaf: Leaf, config: ModelConfig) -> int:
    """Elements that one token meets."""
    is_some = isinstance(config, MixtralConfig) and leaf.name.startswith(EXPERTS)
    return leaf.size * config.top_k // config.num_experts if is_some else leaf.size


def num_params(config: ModelConfig) -> int:
    """With the padding of the vocabulary."""
    return moments.elements(leaves(config))


def _lookups(config: ModelConfig) -> tuple[str, ...]:
    """Tables that are only looked up: they multiply nothing."""
    return () if isinstance(config, GPT2Config) or config.tied else ("wte",)
