"""The closed form: what a step of a model needs and moves, from its config alone. Nothing is traced; it takes milliseconds.

Temporaries are the largest of three moments of the step (`jzero.plan.moments`); `docs/plan.md` says how far they were off.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jzero import stages
from jzero.audit import moved
from jzero.models import GPT2Config, ModelConfig
from jzero.plan import moments, pipelines
from jzero.plan.job import Job
from jzero.plan.shapes import Leaf, leaves

# Sums of activations over `tensor`, per layer and microbatch: two forward (after the second product of attention and MLP), two
# backward (into the first ones, added up before they are sent), and where the layer is computed again attention's once more.
_SUMS = {"none": 4, "dots": 4, "full": 5}
_SUMS_OUTSIDE = 2  # the embedding's rows, looked up in pieces of the vocabulary; the head's gradient of its input


class Memory(NamedTuple):
    """Bytes per device."""

    at_rest: dict[str, int]  # role -> bytes: params, opt_state, batch
    live: dict[str, int]  # the parts of the moment that needs most
    moment: str  # "head", "backward" or "update"

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
    size, found = moments.sizes(job), pipelines.held(job)
    stage = stages.get(job.stage)
    whole, shard = moments.elements(found, 1), moments.elements(found, job.data)
    rest = {
        "params": size.param * (shard if stage.shard_params else whole),
        "opt_state": 2 * size.moment * (shard if stage.shard_opt_state else whole),
        "batch": 4 * job.accumulate * job.micro_sequences * (job.seq + 1),
    }
    found_moments = moments.moments(job, fused_attention=fused_attention)
    name = max(found_moments, key=lambda one: sum(found_moments[one].values()))
    return Memory(rest, {part: amount for part, amount in found_moments[name].items() if amount}, name)


def wire(job: Job) -> dict[str, dict[str, int]]:
    """Axis -> kind -> bytes per device and step, with the ring algorithm; DESIGN's table of stages, leaf by leaf."""
    size = moments.sizes(job)
    if job.pipe > 1:
        table = pipelines.costs(job, moments.saved(job, size))[1]
    else:
        table = _zero(job, size, leaves(job.config, job.tensor))
    if job.tensor > 1:
        # Of one device's layers; a microbatch meets both ends once, whatever the number of pipe stages.
        sums = _SUMS[job.remat] * pipelines.rows_of(job) + _SUMS_OUTSIDE
        activation = size.compute * job.micro_tokens * job.config.dim
        table["tensor"] = {"all-reduce": moved("all-reduce", activation * sums * job.accumulate, job.tensor)}
    return table


def _zero(job: Job, size: moments.Sizes, found: Sequence[Leaf]) -> dict[str, dict[str, int]]:
    """What ZeRO moves of one device's pieces."""
    stage, k = stages.get(job.stage), job.accumulate
    table: dict[str, dict[str, int]] = {}

    def add(axis: str, kind: str, amount: int, members: int) -> None:
        if members > 1 and amount:
            kinds = table.setdefault(axis, {})
            kinds[kind] = kinds.get(kind, 0) + moved(kind, amount, members)

    both = "+".join(axis for axis in job.mesh if axis in ("replica", "data"))
    for leaf in found:
        total = leaf.size * leaf.repeats
        if stage.gather == "never" or not leaf.is_split(job.data):
            add(both, "all-reduce", size.reduce_once * total, job.num_shards)
            continue
        uses = k * (2 if leaf.is_layer else 1) if stage.gather == "use" else 1
        add("data", "all-gather", size.compute * total * uses, job.data)
        once = stage.reduce == "step"
        add("data", "reduce-scatter", (size.reduce_once if once else size.reduce * k) * total, job.data)
        add("replica", "all-reduce", size.reduce_once * total // job.data, job.replica)
    return table


def flops_per_token(config: ModelConfig, seq: int) -> float:
    """6 N + 12 L d T, as the models and every published MFU count: `jzero.models.FLOPS_FORMULA`."""
    padding = (getattr(config, "padded_vocab_size", None) or config.vocab_size) - config.vocab_size
    count = sum(leaf.size * leaf.repeats for leaf in leaves(config) if leaf.name not in ("wpe", *_lookups(config)))
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return 6.0 * (count - padding * config.dim) + attention * seq


def num_params(config: ModelConfig) -> int:
    """With the padding of the vocabulary."""
    return moments.elements(leaves(config), 1)


def _lookups(config: ModelConfig) -> tuple[str, ...]:
    """Tables that are only looked up: they multiply nothing."""
    return () if isinstance(config, GPT2Config) or config.tied else ("wte",)
