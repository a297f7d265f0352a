"""What a stage should move, leaf by leaf: the formula that the report prints beside what the compiler made of it.

Elements are counted in whole leaves; the ring algorithm carries (N-1)/N of them, twice that for an all-reduce.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero import _compat
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


def composed(
    stage: Stage, params: Sequence[Param], uses: Iterable[Use], wire: Wire, axes: dict[str, int], num_scalars: int
) -> Table:
    """Expected wire bytes of a composed step whose gradient is manual.

    Args:
      params: leaves in order. Whole ones (tiny, indivisible, stage 0) are all-reduced once a step.
      uses: of the split leaves in the loss of one microbatch.
      axes: sizes of `replica` and `data`.
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


def opaque(stage: Stage, params: Sequence[tuple[int, Any, bool]], uses: Iterable[Use], num_shards: int) -> Table:
    """Expected wire bytes over `data` of a step that jzero did not write: each gradient reduced once, in the parameter's dtype.

    Args:
      params: per leaf its elements, dtype, and whether it (or at stages 1 and 2 its optimizer state) is split.
      uses: in the whole step, where forward and backward uses stand apart; those of one loop body share a gather.
    """
    kinds: defaultdict[str, int] = defaultdict(int)
    for size, dtype, is_split in params:
        kind = "reduce-scatter" if is_split else "all-reduce"
        kinds[kind] += moved(kind, size * jnp.dtype(dtype).itemsize, num_shards)
        if is_split and stage.gather == "step":
            kinds["all-gather"] += moved("all-gather", size * jnp.dtype(dtype).itemsize, num_shards)
    for use in _apart(uses) if stage.gather == "use" else ():
        size = use.num_elements * use.trips * use.eqn.invars[use.operand].aval.dtype.itemsize
        kinds["all-gather"] += moved("all-gather", size, num_shards)
    return {"data": dict(kinds)} if num_shards > 1 else {}


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
