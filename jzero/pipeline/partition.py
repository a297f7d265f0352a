"""Which layers go to which stage: contiguous pieces such that the slowest is as fast as can be. Pure Python.

A pipeline runs at the pace of its slowest stage, and a vocabulary head can weigh as much as several layers. The optimum over
contiguous splits is found exactly, by dynamic programming over (stages, layers): O(stages x layers^2).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jzero._errors import explain
from jzero.pipeline.schedule import Schedule

WHO = "jzero.pipeline.partition"
INFINITY = float("inf")


class Costs(NamedTuple):
    """What each part of a model costs, in one unit: parameters, FLOPs or seconds."""

    layers: tuple[float, ...]
    embed: float = 0.0
    head: float = 0.0

    def of(self, first: int, end: int) -> float:
        """Layers `first` to `end`, with the embedding if they are the first ones and the head if the last."""
        ends = (self.embed if first == 0 else 0.0) + (self.head if end == len(self.layers) else 0.0)
        return sum(self.layers[first:end]) + ends


class MemoryLimit(NamedTuple):
    """The most that a device may hold: its layers' state, and what its schedule keeps of each layer for backward.

    Buffers have one size on all devices, so what is kept is the schedule's largest number of live inputs times the layer's
    saved bytes. Of v chunks per device each counts as if all were like it.
    """

    limit_bytes: float
    state_bytes: Costs  # per layer: parameters, gradients and optimizer state on one device
    saved_bytes: Costs  # per layer and microbatch
    schedule: Schedule

    def of(self, first: int, end: int) -> float:
        """Bytes of a device whose stage has these layers."""
        copies, live = self.schedule.num_chunks, max(self.schedule.live)
        ends = (self.state_bytes.embed if first == 0 else 0.0) + (self.state_bytes.head if end == self.num_layers else 0.0)
        return copies * sum(self.state_bytes.layers[first:end]) + ends + live * self.saved_bytes.of(first, end)

    @property
    def num_layers(self) -> int:
        return len(self.state_bytes.layers)


def split(costs: Costs, num_stages: int, *, memory: MemoryLimit | None = None) -> tuple[int, ...]:
    """How many layers each (virtual) stage gets, so that the largest stage costs as little as possible. None is empty.

    Args:
      costs: of every layer, the embedding (first stage) and the head (last stage).
      num_stages: pipe stages times chunks.
      memory: splits that need more are left out.

    Raises:
      ValueError: fewer layers than stages, costs that are no numbers of 0 or more, or no split that fits the memory (the
        message says what the best one needs).

    Example:
      >>> split(Costs((1.0,) * 7, head=2.0), 3)
      (3, 3, 1)
    """
    check(costs, num_stages)
    fits = _always if memory is None else lambda first, end: memory.of(first, end) <= memory.limit_bytes
    bounds = _smallest_largest(costs.of, fits, len(costs.layers), num_stages)
    if bounds is None:
        raise ValueError(_does_not_fit(memory, num_stages))
    return tuple(end - first for first, end in itertools.pairwise(bounds))


def largest(costs: Costs, counts: Sequence[int]) -> float:
    """The cost of the largest stage of a split."""
    bounds = [0, *itertools.accumulate(counts)]
    return max(costs.of(first, end) for first, end in itertools.pairwise(bounds))


def even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Splitting by layer count alone: earlier stages take what is left over."""
    check(Costs((1.0,) * num_layers), num_stages)
    size, more = divmod(num_layers, num_stages)
    return tuple(size + (stage < more) for stage in range(num_stages))


def check(costs: Costs, num_stages: int) -> None:
    """Raise for fewer layers than stages, or costs that cannot be compared."""
    num_layers = len(costs.layers)
    if type(num_stages) is not int or not 1 <= num_stages <= num_layers:
        legal = ", ".join(str(size) for size in range(1, num_layers + 1) if num_layers % size == 0)
        found = [f"{num_layers} layers for {num_stages!r} stages (pipe stages times chunks)"]
        fix = f"Use fewer stages: up to {num_layers}; of equal size with {legal}."
        raise ValueError(explain(WHO, "every stage needs a layer", found=found, fix=fix))
    parts = [("embed", costs.embed), ("head", costs.head), *((f"layer {i}", cost) for i, cost in enumerate(costs.layers))]
    wrong = [f"{name}: {cost!r}" for name, cost in parts if not 0 <= cost < INFINITY]
    if wrong:
        raise ValueError(
            explain(WHO, "a cost is a number, 0 or larger", found=wrong, fix="Count parameters, FLOPs or seconds.")
        )


def _always(first: int, end: int) -> bool:
    return True


def _smallest_largest(
    cost: Callable[[int, int], float], fits: Callable[[int, int], bool], num_layers: int, num_stages: int
) -> tuple[int, ...] | None:
    """The bounds of the best split, or None if none fits. best[j]: the largest stage if the stages so far end at layer j."""
    best, cuts = {0: 0.0}, []
    for stage in range(num_stages):
        after, left = {}, num_stages - stage - 1
        ends = [num_layers] if left == 0 else range(stage + 1, num_layers - left + 1)
        for end in ends:
            choices = [(max(best[first], cost(first, end)), -first) for first in best if first < end and fits(first, end)]
            if choices:
                after[end] = min(choices)
        best = {end: value for end, (value, _) in after.items()}
        cuts.append({end: -first for end, (_, first) in after.items()})
    if num_layers not in best:
        return None
    bounds = [num_layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return tuple(reversed(bounds))


def _does_not_fit(memory: MemoryLimit | None, num_stages: int) -> str:
    assert memory is not None, "without a limit everything fits"
    bounds = _smallest_largest(memory.of, _always, memory.num_layers, num_stages)
    assert bounds is not None
    needs = [memory.of(first, end) for first, end in itertools.pairwise(bounds)]
    found = [f"stage {stage}: {size:,.0f} bytes" for stage, size in enumerate(needs) if size > memory.limit_bytes]
    context = f"the split that needs least; schedule {memory.schedule.name!r} holds up to {max(memory.schedule.live)} inputs"
    fix = "Use more stages, a schedule that holds less (1f1b), remat='full', smaller microbatches, or shard the state further."
    problem = f"no split of {memory.num_layers} layers over {num_stages} stages fits {memory.limit_bytes:,.0f} bytes"
    return explain(WHO, problem, found=found, context=context, fix=fix)
