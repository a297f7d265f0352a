"""Which parameters in host memory come at their uses (`Offload(fetch="use")`), decided from the loss's program."""

from collections.abc import Callable, Sequence
from typing import Any

from jzero._errors import columns, explain
from jzero._tree import is_float, num_elements
from jzero.engine import experts
from jzero.engine.layout import Layout, Options
from jzero.gather.away import comes_once, findings
from jzero.gather.facts import Fact, Reading, rooted
from jzero.mesh import batch_axes
from jzero.offload.asked import HOST, USE

WHO = "jzero.Offload"


def is_asked(options: Options) -> bool:
    return options.offload is not None and options.offload.fetch == USE


def candidates(layout: Layout, options: Options) -> list[int]:
    """The parameters that rest in host memory and are not small."""
    if not is_asked(options):
        return []
    rows = enumerate(zip(layout.placements, layout.avals, layout.places, strict=True))
    return [
        index
        for index, (placement, aval, place) in rows
        if placement.leaf.role == "params" and place is not None and place.kind == HOST
        if num_elements(aval) >= options.min_shard_elements and is_float(aval)
    ]


def at_use(
    layout: Layout, options: Options, mask: Sequence[bool], reading: Reading, program: Any, is_apart: Callable[[int], bool]
) -> tuple[dict[int, tuple[int, ...]], list[str]]:  # fmt: skip
    """The parameters that do, with the loops around their uses, and findings about them and the others.

    Args:
      program: the loss on a microbatch, its parameters first.
      is_apart: whether a parameter's gradient has still to be added up over an axis after its reduction.

    Raises:
      ValueError: no parameter can.
    """
    reasons: dict[int, str] = {}
    facts: list[Fact | None] = [None] * len(program.in_avals)
    for index in candidates(layout, options):
        entries = layout.split(index)
        if mask[index] and is_apart(index):
            reasons[index] = "is whole on several devices, which add up its gradient once a step"
        elif any(experts.apart(entry, batch_axes(options.mesh)) for entry in entries):
            reasons[index] = "is split over the axis 'expert'"
        else:
            facts[index] = Fact(index, entries)
    found = comes_once(reading, program, rooted(facts))
    reasons |= found.reasons
    path = lambda index: layout.placements[index].leaf.path
    if not found.loops:
        rows = columns([path(index), reason] for index, reason in sorted(reasons.items())) or ["no parameter rests there"]
        fix = "Leave fetch= out; or stack layers and scan them, so that each parameter is used in one place."
        problem = "fetch='use' would have no effect: no parameter can come at its use"
        raise ValueError(explain(WHO, problem, found=rows, fix=fix))
    told = findings([path(index) for index in found.loops], {path(index): why for index, why in sorted(reasons.items())})
    return found.loops, list(told)
