"""Which layers of a pipeline are where: at rest in the user's order, in a step in the order that the schedule runs them.

At rest a stacked leaf is `[num_layers, ...]`, as one device would have it, so a checkpoint fits any mesh and schedule. Split
evenly over `pipe` on dim 0, with one chunk per device, each device already has the layers it runs. Otherwise (chunks, uneven
stages) a step gathers the leaf over `pipe` and takes its own rows, padded to the largest stage, and brings gradients back by a
reduce-scatter: one all-gather and one reduction of the stack per step, which the report counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jzero._errors import explain
from jzero.pipeline import partition
from jzero.pipeline.model import Pipeline, check_params, is_list, num_layers
from jzero.pipeline.schedule import Schedule

AXIS = "pipe"


def stacked_layers(params: Any, num_leaves: int) -> tuple[int | None, ...]:
    """Per leaf of a `TrainState` 0, the dim that counts layers, for parameters that are stacks of them; None for others."""
    check_params(params)
    if is_list(params["layers"]):
        return (None,) * num_leaves
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]  # they come first in a TrainState
    return tuple(0 if name == "layers" else None for name in names) + (None,) * (num_leaves - len(names))


def pipe_dims(avals: Sequence[Any], stacked: Sequence[int | None], num_pipe_stages: int) -> tuple[int | None, ...]:
    """Where stacks of layers are split over `pipe` at rest: by layer if that divides, else any dim that does, else nowhere."""

    def dim(shape: tuple[int, ...]) -> int | None:
        if shape[0] % num_pipe_stages == 0:
            return 0
        fits = [index for index, size in enumerate(shape) if index and size % num_pipe_stages == 0]
        return max(fits, key=lambda index: (shape[index], index), default=None)

    return tuple(None if layers is None else dim(aval.shape) for aval, layers in zip(avals, stacked, strict=True))


@dataclass(frozen=True)
class StageLayers:
    """The layers of each virtual stage, and each device's rows of a stack."""

    counts: tuple[int, ...]  # per virtual stage, from first to last
    num_pipe_stages: int

    @property
    def largest(self) -> int:
        return max(self.counts)

    @property
    def at_home(self) -> bool:
        """Whether a stack split evenly over `pipe` is already as the schedule wants it."""
        return len(self.counts) == self.num_pipe_stages and len(set(self.counts)) == 1

    def rows(self) -> np.ndarray:
        """int32[pipe stages, chunks x largest]: the layer of each row that a device runs; padding repeats layer 0."""
        starts, size = np.cumsum([0, *self.counts]), self.num_pipe_stages
        table = np.zeros((size, len(self.counts) // size, self.largest), np.int32)
        for virtual, count in enumerate(self.counts):
            table[virtual % size, virtual // size, :count] = starts[virtual] + np.arange(count)
        return table.reshape(size, -1)

    def chunk_counts(self) -> np.ndarray:
        """int32[pipe stages, chunks]."""
        return np.array(self.counts, np.int32).reshape(-1, self.num_pipe_stages).T.copy()

    @property
    def padding(self) -> float:
        """Rows that are padding, as a part of all."""
        return 1.0 - sum(self.counts) / (len(self.counts) * self.largest)

    def take(self, leaf: jax.Array, rows: jax.Array, dim: int | None) -> jax.Array:
        """Inside `shard_map`: from a leaf at rest to the rows that this device runs."""
        if self.at_home and dim == 0:
            return leaf
        whole = leaf if dim is None else jax.lax.all_gather(leaf, AXIS, axis=dim, tiled=True)
        return jnp.take(whole, rows, axis=0)

    def give_back(self, grad: jax.Array, rows: jax.Array, dim: int | None) -> jax.Array:
        """The transpose of `take`: gradients of rows to where the leaf rests. Padding has gradient zero."""
        if self.at_home and dim == 0:
            return grad
        whole = jnp.zeros((sum(self.counts), *grad.shape[1:]), grad.dtype).at[rows].add(grad)
        return (
            jax.lax.psum(whole, AXIS) if dim is None else jax.lax.psum_scatter(whole, AXIS, scatter_dimension=dim, tiled=True)
        )


def stage_layers(model: Pipeline, params: Any, schedule: Schedule, *, who: str) -> StageLayers:
    """The split that the model asks for, or the even one; raises where layers and stages do not fit."""
    count, num_stages = num_layers(params), schedule.num_virtual_stages
    if model.split is None:
        return StageLayers(partition.even(count, num_stages), schedule.num_pipe_stages)
    wrong = [f"split has {len(model.split)} stages"] if len(model.split) != num_stages else []
    wrong += [f"split has {sum(model.split)} layers"] if sum(model.split) != count else []
    wrong += [f"stage {i} has {size!r} layers" for i, size in enumerate(model.split) if type(size) is not int or size < 1]
    if wrong:
        context = f"{count} layers; {schedule.num_pipe_stages} pipe stages of {schedule.num_chunks} chunks"
        fix = "Leave split= out to split evenly, or use jzero.pipeline.partition.split(costs, num_stages)."
        raise ValueError(explain(who, "split= does not fit the layers and stages", found=wrong, context=context, fix=fix))
    return StageLayers(model.split, schedule.num_pipe_stages)
