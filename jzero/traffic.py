"""What a stage should move, leaf by leaf: the formula that the report prints beside what the compiler made of it.

Elements are counted in whole leaves; the ring algorithm carries (N-1)/N of them, twice that for an all-reduce.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero import _compat
from jzero._types import ALSO_AXES
from jzero.audit import moved
from jzero.gather.facts import Use, kept_use
from jzero.stages import Stage

# Linear in the parameter with a constant coefficient, so the backward pass does not read it.
NOT_READ_BACKWARD = frozenset(
    [
        "gather",
        "dynamic_slice",
        "slice",
        "add",
        "sub",
        "add_any",
        "broadcast_in_dim",
        "concatenate",
        "pad",
        "neg",
        "reshape",
        "rev",
        "reduce_sum",
    ]
)

Table = dict[str, dict[str, int]]  # axis -> kind of collective -> bytes per device and step


class Wire(NamedTuple):
    """Dtypes and repetitions of one composed step."""

    compute: Any
    reduce: Any
    reduce_once: Any
    num_micro: int


class Param(NamedTuple):
    """One parameter leaf as the formula sees it; of a leaf that other axes split too, the piece that one device holds."""

    num_elements: int
    is_split: bool
    trains: bool
    num_whole: int = 0  # where ZeRO shards it over more axes than `data`: what these make of the piece
    also: tuple[str, ...] = ()  # those axes


def composed(
    stage: Stage, params: Sequence[Param], uses: Iterable[Use], wire: Wire, axes: dict[str, int], num_scalars: int
) -> Table:
    """Expected wire bytes of a composed step whose gradient is manual.

    Axes that split each example (`sequence`) add up every microbatch's gradients, at any stage; what they split of the leaves
    they gather after `data`. Not counted: what activations send over them.

    Args:
      params: leaves in order. Whole ones (tiny, indivisible, stage 0) are all-reduced once a step.
      uses: of the split leaves in the loss of one microbatch.
      axes: sizes of `replica`, `data` and those that split each example.
      num_scalars: float32 values in the closing all-reduce.
    """
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    both = "+".join(name for name in ("replica", "data") if name in axes)
    everyone = axes["data"] * axes.get("replica", 1)

    def add(axis: str, kind: str, elements: int, dtype: Any, members: int) -> None:
        if members > 1 and elements:
            table[axis][kind] += moved(kind, elements * jnp.dtype(dtype).itemsize, members)

    gathered, reduced = _by_leaf(stage, params, list(uses), wire.num_micro)
    for index, param in enumerate(params):
        for axis in ALSO_AXES if param.trains or param.also else ():
            ratio = param.num_whole // param.num_elements if axis in param.also else 1
            times = wire.num_micro if stage.reduce == "step" or axis not in param.also else 1
            kind = "reduce-scatter" if axis in param.also else "all-reduce"
            summed = (reduced[index] or param.num_elements) if axis in param.also else param.num_elements
            add(axis, "all-gather", gathered[index] * ratio if axis in param.also else 0, wire.compute, axes.get(axis, 1))
            add(axis, kind, summed * ratio * times * param.trains, wire.compute, axes.get(axis, 1))
        if not param.is_split:
            add(both, "all-reduce", param.num_elements * param.trains, wire.reduce_once, everyone)
            continue
        once = wire.reduce_once if stage.reduce == "step" else wire.reduce
        add("data", "all-gather", gathered[index], wire.compute, axes["data"])
        add("data", "reduce-scatter", reduced[index] * param.trains, once, axes["data"])
        shard = param.num_elements // axes["data"] * param.trains
        add("replica", "all-reduce", shard, wire.reduce_once, axes.get("replica", 1))
    add(both, "all-reduce", num_scalars, jnp.float32, everyone)
    return {axis: dict(kinds) for axis, kinds in table.items()}


def _by_leaf(stage: Stage, params: Sequence[Param], uses: list[Use], num_micro: int) -> tuple[list[int], list[int]]:
    """Elements gathered and reduced per step, for each leaf."""
    gathered = [param.num_elements if stage.gather == "step" else 0 for param in params]
    reduced = [param.num_elements if stage.reduce == "step" else 0 for param in params]
    levels: dict[tuple[int, tuple[int, ...]], int] = {}
    kept = kept_use(uses)
    for use in uses:
        size = use.num_elements * use.trips * num_micro
        if stage.gather == "use":
            gathered[use.leaf] += size * (1 if use is kept else num_gathers(use))
        key = (use.leaf, use.level)  # uses that share a level are collected and reduced once
        levels[key] = max(levels.get(key, 0), size)
    if stage.reduce == "use":
        for (leaf, _), size in levels.items():
            reduced[leaf] += size
    return gathered, reduced


def num_gathers(use: Use) -> int:
    """Forward, and again backward if the backward pass reads the parameter or recomputes the use."""
    return 1 if use.eqn.primitive.name in NOT_READ_BACKWARD and not use.in_remat else 2


class OpaqueParam(NamedTuple):
    """One parameter leaf of a step that jzero did not write: its pieces as in `Param`."""

    num_elements: int
    num_whole: int
    dtype: Any
    is_split: bool  # over `data`: itself, or at stages 1 and 2 its optimizer state


def opaque(stage: Stage, params: Sequence[OpaqueParam], uses: Iterable[Use], axes: dict[str, int]) -> Table:
    """Expected wire bytes of a step that jzero did not write: each gradient reduced once, in the parameter's dtype.

    Args:
      uses: in the whole step, where forward and backward uses stand apart; those of one loop body share a gather.
      axes: sizes of `data` and of the axes that split each example, over all of which a gradient is reduced at once.
    """
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    num_data, num_also = axes["data"], math.prod(axes.values()) // axes["data"]
    names = {"data": num_data, "+".join(axis for axis in axes if axis != "data"): num_also, "+".join(axes): num_data * num_also}

    def add(axis: str, kind: str, num_bytes: int) -> None:
        if names[axis] > 1:
            table[axis][kind] += moved(kind, num_bytes, names[axis])

    def gather(piece: int, whole: int, itemsize: int) -> None:
        add("data", "all-gather", piece * itemsize)
        if whole > piece:
            add(list(names)[1], "all-gather", whole * itemsize)

    for param in params:
        itemsize = jnp.dtype(param.dtype).itemsize
        add("+".join(axes), "reduce-scatter" if param.is_split else "all-reduce", param.num_whole * itemsize)
        if param.is_split and stage.gather == "step":
            gather(param.num_elements, param.num_whole, itemsize)
    for use in _apart(uses) if stage.gather == "use" else ():
        gather(use.num_elements * use.trips, use.num_whole * use.trips, use.eqn.invars[use.operand].aval.dtype.itemsize)
    return {axis: dict(kinds) for axis, kinds in table.items()}


def _apart(uses: Iterable[Use]) -> list[Use]:
    """Uses that need a gather of their own."""
    found: dict[Any, Use] = {}
    before: Use | None = None
    for index, use in enumerate(uses):
        at_once = before is not None and (before.leaf, before.level) == (use.leaf, use.level)
        before = use
        phase = use.in_remat or _compat.is_backward(use.eqn)
        shares = bool(use.level) or use.in_remat
        if not at_once:
            found.setdefault((use.level, phase, id(use.eqn.invars[use.operand])) if shares else index, use)
    return list(found.values())
