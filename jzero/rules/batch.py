"""Placement of the batch: dim 0 over the batch axes, dim 1 over `sequence`; keys and scalars whole."""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jzero._errors import columns, explain
from jzero._tree import is_key, named_leaves, short
from jzero.mesh import axis_size, batch_axes, describe

SEQUENCE = "sequence"


def is_split(leaf: Any) -> bool:
    """Whether dim 0 of a batch leaf runs over examples: not for scalars, typed keys and old-style uint32[2] keys."""
    shape = np.shape(leaf)
    return bool(shape) and not is_key(leaf) and not (shape == (2,) and leaf.dtype == np.uint32)


def batch_spec(leaf: Any, mesh: Mesh, path: str = "") -> PartitionSpec:
    """The spec of one batch leaf, x[B_(replica,data,expert), T_sequence, ...]; PRNG keys and scalars are replicated.

    Where the mesh has an axis `sequence` that does not divide dim 1 (tokens[B, T + 1], say), that dim stays whole.

    Raises:
      ValueError: dim 0 is not a multiple of the batch axes' size. `check_batch` says it for a whole batch at once.

    Example:
      >>> import jax
      >>> from jzero.mesh import make_mesh
      >>> batch_spec(jax.ShapeDtypeStruct((16, 128), "int32"), make_mesh(data=8))
      P('data',)
    """
    if not is_split(leaf):
        return PartitionSpec()
    axes = batch_axes(mesh)
    if np.shape(leaf)[0] % axis_size(mesh, axes):
        raise ValueError(_message([[path or "batch", leaf]], mesh, 1))
    rows, shape, num_pieces = axes if len(axes) > 1 else axes[0], np.shape(leaf), axis_size(mesh, SEQUENCE)
    by_length = num_pieces > 1 and len(shape) > 1 and shape[1] % num_pieces == 0
    return PartitionSpec(rows, SEQUENCE) if by_length else PartitionSpec(rows)


def check_batch(batch: Any, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise a `ValueError` that lists every leaf whose dim 0 the batch axes times `accumulate` do not divide."""
    multiple = axis_size(mesh, batch_axes(mesh)) * accumulate
    wrong = [[path or "batch", leaf] for path, leaf in named_leaves(batch) if is_split(leaf) and np.shape(leaf)[0] % multiple]
    if wrong:
        raise ValueError(_message(wrong, mesh, accumulate))


def _message(wrong: list[list[Any]], mesh: Mesh, accumulate: int) -> str:
    axes = batch_axes(mesh)
    multiple = axis_size(mesh, axes) * accumulate
    rows = [[path, short(leaf), f"dim 0 has size {leaf.shape[0]}, not a multiple of {multiple}"] for path, leaf in wrong]
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes) + (
        f" x accumulate {accumulate}" if accumulate > 1 else ""
    )
    size = wrong[0][1].shape[0]
    below, above = size // multiple * multiple, math.ceil(size / multiple) * multiple
    legal = " or ".join(str(n) for n in (below, above) if n)
    problem = f"the batch cannot be split into {multiple} equal parts ({sizes})"
    fix = f"Use a batch of {legal}, or batch, mask = jzero.pad_batch(batch, {multiple}) and a loss that uses the mask."
    return explain("jzero.shard", problem, found=columns(rows), context=f"mesh {describe(mesh)}", fix=fix)
