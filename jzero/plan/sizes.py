"""Sizes that must fit each other: the mesh and the target, axes and the model, the batch and what it is split over."""

import math

from jzero._errors import explain, suggest
from jzero.models import MixtralConfig
from jzero.pipeline import schedules
from jzero.plan.names import WHO, config_of, divisors, listed, padded
from jzero.plan.shapes import tensor_sizes

AXES = ("replica", "data", "pipe", "sequence", "tensor", "expert")  # in the mesh's order
BATCH_AXES = ("replica", "data", "expert")  # that examples are split over
SCHEDULE = "1f1b"  # of pipelines, unless one is named
_OTHERS = ("pipe", "sequence", "tensor", "expert")


def counts(**counts: int | None) -> None:
    """All of them positive."""
    wrong = [f"{name}={value}" for name, value in counts.items() if value is not None and value < 1]
    if wrong:
        raise ValueError(explain(WHO, "counts must be positive", found=wrong, fix="Leave them out to get the defaults."))


def mesh(asked: dict[str, int], num_devices: int, target: str) -> dict[str, int]:
    """Sizes of the axes larger than 1, and data's; what is not said goes to `data`."""
    unknown = [axis for axis in asked if axis not in AXES]
    if unknown:
        found = [f"{axis}={asked[axis]}: {suggest(axis, AXES)}" for axis in unknown]
        fix = (
            "Use data (sharded over), replica (repeated over), tensor (each layer split), sequence (each example split), "
            "expert (experts apart) and pipe (layers split)."
        )
        raise ValueError(explain(WHO, f"the planned models split over {', '.join(AXES)}", found=found, fix=fix))
    sizes = {axis: asked.get(axis, 1) for axis in AXES}
    apart = math.prod(sizes[axis] for axis in _OTHERS)
    left = num_devices // apart if apart else 0
    if "replica" not in asked and "data" in asked:
        sizes["replica"] = left // asked["data"] if asked["data"] else 0
    if "data" not in asked:
        sizes["data"] = left // sizes["replica"] if sizes["replica"] else 0
    if math.prod(sizes.values()) != num_devices or num_devices == 0:
        found = [f"{axis}={size}" for axis, size in asked.items()]
        fits = apart > 0 and num_devices % apart == 0
        others = "".join(f",{axis}={sizes[axis]}" for axis in _OTHERS if sizes[axis] > 1 and fits)
        of = left if others else num_devices
        legal = [f"replica={one},data={of // one}{others}" for one in divisors(of)[:6]]
        fix = f"Use --mesh {' or '.join(legal)}."
        raise ValueError(
            explain(WHO, f"the mesh does not multiply to the {num_devices} devices of {target}", found=found, fix=fix)
        )
    return {axis: size for axis, size in sizes.items() if size > 1 or axis == "data"}


def axes(model: str, mesh: dict[str, int], seq: int, accumulate: int, schedule: str | None) -> None:
    """Heads for `tensor`, positions for `sequence`, experts for `expert`, layers and microbatches for `pipe`."""
    config, pipe = config_of(model), mesh.get("pipe", 1)
    _divides("tensor", f"{model}'s heads", mesh, tensor_sizes(padded(model)))
    _divides("sequence", f"sequences of {seq} tokens", mesh, sequence_sizes(model, seq, mesh.get("tensor", 1)))
    _divides("expert", f"{model}'s experts", mesh, expert_sizes(model))
    if schedule is not None and pipe == 1:
        fix = "Leave --schedule out, or give the mesh a pipe axis: --mesh pipe=4."
        raise ValueError(explain(WHO, "a schedule needs a pipeline", found=[f"--schedule {schedule}, no axis 'pipe'"], fix=fix))
    together = [axis for axis in ("sequence", "expert") if mesh.get(axis, 1) > 1]
    if pipe > 1 and (together or isinstance(config, MixtralConfig)):
        found = [f"pipe={pipe} with {' and '.join(f'{axis}={mesh[axis]}' for axis in together) or model}"]
        fix = "Leave pipe out of the mesh."
        raise NotImplementedError(explain(WHO, "a pipeline has neither split sequences nor experts", found=found, fix=fix))
    if len(together) > 1:
        found, fix = [f"sequence={mesh['sequence']},expert={mesh['expert']}"], "Use one of them."
        raise NotImplementedError(explain(WHO, "sequence beside expert has no closed form", found=found, fix=fix))
    if pipe == 1:
        return
    if pipe > config.num_layers:
        fix = f"Use at most pipe={config.num_layers}."
        raise ValueError(explain(WHO, f"{model} has {config.num_layers} layers", found=[f"pipe={pipe}"], fix=fix))
    schedules.get(schedule or SCHEDULE, pipe, accumulate, who=WHO)  # raises on unknown names and too few microbatches


def sequence_sizes(model: str, seq: int, tensor: int = 1) -> list[int]:
    """Sizes of `sequence` that attention takes: they divide heads (an exchange), or twice the size the positions (a ring)."""
    heads = config_of(model).num_heads // tensor
    return [one for one in divisors(seq) if heads % one == 0 or seq % (2 * one) == 0]


def expert_sizes(model: str) -> list[int]:
    """Sizes of `expert` that divide a model's experts."""
    config = config_of(model)
    return divisors(config.num_experts) if isinstance(config, MixtralConfig) else [1]


def _divides(axis: str, what: str, mesh: dict[str, int], legal: list[int]) -> None:
    size = mesh.get(axis, 1)
    if size > 1 and size not in legal:
        fix = f"Legal sizes of axis '{axis}' are {listed(legal)}."
        raise ValueError(explain(WHO, f"axis '{axis}' does not divide {what}", found=[f"{axis}={size}"], fix=fix))


def batch(batch: int | None, tokens: int | None, seq: int, multiple: int, mesh: dict[str, int], accumulate: int) -> int:
    """Sequences per step, `multiple` of which are one for each device and microbatch."""
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
