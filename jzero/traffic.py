"""What a stage should move, leaf by leaf: the formula that the report prints beside what the compiler made of it.

Elements are counted in whole leaves; the ring algorithm carries (N-1)/N of them, twice that for an all-reduce.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero import _compat
from jzero._types import ALSO_AXES, BATCH_AXES
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
    split: tuple[str, ...]  # the axes that ZeRO gathers and reduces it over; empty if it is whole
    trains: bool
    rest: tuple[str, ...] = ("replica", "data")  # the other batch axes whose devices hold all of it
    num_whole: int = 0  # where ZeRO shards it over more axes than those: what these make of the piece
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
      axes: sizes of the axes that examples are split over and of those that split each example, in the mesh's order.
      num_scalars: float32 values in the closing all-reduce.
    """
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    size_of = lambda names: math.prod(axes.get(name, 1) for name in names)

    def add(names: Iterable[str], kind: str, elements: int, dtype: Any) -> None:
        members = size_of(names)
        if members > 1 and elements:
            axis = "+".join(name for name in axes if name in names and axes[name] > 1)
            table[axis][kind] += moved(kind, elements * jnp.dtype(dtype).itemsize, members)

    gathered, reduced = _by_leaf(stage, params, list(uses), wire.num_micro)
    once = wire.reduce_once if stage.reduce == "step" else wire.reduce
    for index, param in enumerate(params):
        for axis in ALSO_AXES if param.trains or param.also else ():
            ratio = param.num_whole // param.num_elements if axis in param.also else 1
            times = wire.num_micro if stage.reduce == "step" or axis not in param.also else 1
            kind = "reduce-scatter" if axis in param.also else "all-reduce"
            summed = (reduced[index] or param.num_elements) if axis in param.also else param.num_elements
            add((axis,), "all-gather", gathered[index] * ratio if axis in param.also else 0, wire.compute)
            add((axis,), kind, summed * ratio * times * param.trains, wire.compute)
        if param.split:
            add(param.split, "all-gather", gathered[index], wire.compute)
            add(param.split, "reduce-scatter", reduced[index] * param.trains, once)
        held = param.num_elements // size_of(param.split) * param.trains
        add(param.rest, "all-reduce", held, wire.reduce_once)
    add(BATCH_AXES, "all-reduce", num_scalars, jnp.float32)
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
    is_split: bool  # itself, or at stages 1 and 2 its optimizer state
    over: tuple[str, ...] = ("data",)  # the batch axes that it is or would be split over


def opaque(stage: Stage, params: dict[int, OpaqueParam], uses: Iterable[Use], axes: dict[str, int]) -> Table:
    """Expected wire bytes of a step that jzero did not write: each gradient reduced once, in the parameter's dtype.

    Args:
      params: parameters by their leaf's index in the state.
      uses: in the whole step, where forward and backward uses stand apart; those of one loop body share a gather.
      axes: sizes of the axes that ZeRO shards over, over all of which a gradient is reduced at once.
    """
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    also = tuple(name for name in axes if name in ALSO_AXES)

    def add(names: Sequence[str], kind: str, num_bytes: int) -> None:
        over = [name for name in axes if name in names and axes[name] > 1]
        if over:
            table["+".join(over)][kind] += moved(kind, num_bytes, math.prod(axes[name] for name in over))

    def gather(param: OpaqueParam, piece: int, whole: int, itemsize: int) -> None:
        add(param.over, "all-gather", piece * itemsize)
        if whole > piece:
            add(also, "all-gather", whole * itemsize)

    for param in params.values():
        itemsize = jnp.dtype(param.dtype).itemsize
        add((*param.over, *also), "reduce-scatter" if param.is_split else "all-reduce", param.num_whole * itemsize)
        if param.is_split and stage.gather == "step":
            gather(param, param.num_elements, param.num_whole, itemsize)
    for use in _apart(uses) if stage.gather == "use" else ():
        itemsize = use.eqn.invars[use.operand].aval.dtype.itemsize
        gather(params[use.leaf], use.num_elements * use.trips, use.num_whole * use.trips, itemsize)
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
