"""`jzero.tiled`: what is computed position by position, in parts, so that a long sequence's intermediate values fit.

Bekman et al.: Arctic Long Sequence Training, 2025 (TiledMLP, tiled logits and loss).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jzero import _compat
from jzero._errors import columns, explain
from jzero._tree import is_float, short
from jzero._types import BATCH_AXES
from jzero.attention.place import size, status

WHO = "jzero.tiled"


def tiled(fn: Callable[..., Any], num_tiles: int, *, axis: str = "sequence") -> Callable[..., Any]:
    """`fn` of arrays [B, T, ...] computed `num_tiles` parts of T at a time, forward and backward.

    For functions that treat positions apart, as an MLP or a loss from hidden states: what it makes in between (an MLP's hidden
    layer, logits[B, T, V]) then exists for T / num_tiles positions at once. Each tile is computed again in the backward pass.
    Where a mesh axis splits T, each device cuts its own piece: x[B, T_sequence, ...].

    Parameters that `fn` closes over get one gradient, summed over tiles in float32 and then once over `axis` and the batch axes
    that jzero did not make manual (an all-reduce each). The composed engine gathers them once forward and once backward.

    Args:
      fn: of arrays [B, t, ...] that agree on B and t, to a pytree of arrays [B, t, ...], put together again, and of scalars,
        added up: return sums, as for `jzero.weighted`, not means.
      num_tiles: divides T, or a device's piece of it.
      axis: the mesh axis that may split T.

    Raises:
      ValueError: a number of tiles that does not divide the length, arrays that disagree, results of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> mlp = tiled(lambda x: jnp.tanh(x @ jnp.ones((4, 64))) @ jnp.ones((64, 4)), num_tiles=2)
      >>> mlp(jnp.ones((1, 8, 4))).shape
      (1, 8, 4)
    """
    if isinstance(num_tiles, bool) or not isinstance(num_tiles, int) or num_tiles < 1:
        raise ValueError(explain(WHO, "num_tiles is a positive integer", found=[f"num_tiles={num_tiles!r}"], fix="Write 8."))

    def run(*args: Any) -> Any:
        flat, treedef = jax.tree.flatten(args)
        split = _split(flat, num_tiles, axis)
        rows, length = flat[0].shape[0] // size(split.batch), flat[0].shape[1] // (size(split.length) * num_tiles)
        small = [jax.ShapeDtypeStruct((rows, length, *leaf.shape[2:]), leaf.dtype) for leaf in flat]
        on_leaves = lambda *leaves: fn(*jax.tree.unflatten(treedef, leaves))
        with _compat.without_mesh() if split.batch or split.length else nullcontext():
            pure, closed_over = jax.closure_convert(on_leaves, *small)
            outputs = jax.eval_shape(on_leaves, *small)
        call = _Call(lambda leaves, consts: jax.tree.leaves(pure(*leaves, *consts)), split, _sums(outputs, (rows, length)))
        return jax.tree.unflatten(jax.tree.structure(outputs), _tiled(call, flat, closed_over))

    return run


class _Split(NamedTuple):
    """How [B, T, ...] is cut: the axes to be manual, and tiles per device."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    num_tiles: int

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.length or None)


class _Call(NamedTuple):
    fn: Callable[..., list[Any]]  # (leaves of the arguments, what was closed over) -> leaves of the results
    split: _Split
    sums: tuple[bool, ...]  # which results are scalars

    def on_pieces(self, local: Callable[..., Any], num_args: int, outs: Any) -> Callable[..., Any]:
        """`local(args, consts)` on each device's pieces of the arguments."""
        axes = frozenset((*self.split.batch, *self.split.length))
        if not axes:
            return local
        ins = ([self.split.spec] * num_args, PartitionSpec())
        return jax.shard_map(local, in_specs=ins, out_specs=outs, axis_names=axes, check_vma=False)

    def add_up(self, value: jax.Array) -> jax.Array:
        axes = (*self.split.batch, *self.split.length)
        return jax.lax.psum(value, axes) if axes else value

    def tiles(self, leaf: jax.Array) -> jax.Array:
        """[B, T, ...] -> [tiles, B, T / tiles, ...]"""
        cut = leaf.reshape(leaf.shape[0], self.split.num_tiles, -1, *leaf.shape[2:])
        return jnp.moveaxis(cut, 1, 0)

    def join(self, leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(call: _Call, args: list[jax.Array], consts: list[jax.Array]) -> list[jax.Array]:
    def local(args: list[jax.Array], consts: list[jax.Array]) -> list[jax.Array]:
        out = jax.lax.map(lambda leaves: call.fn(leaves, consts), [call.tiles(leaf) for leaf in args])
        return [call.add_up(part.sum(0)) if sums else call.join(part) for part, sums in zip(out, call.sums, strict=True)]

    return call.on_pieces(local, len(args), _out_specs(call))(args, consts)


def _forward(call: _Call, args: list[jax.Array], consts: list[jax.Array]) -> tuple[list[jax.Array], Any]:
    return _tiled(call, args, consts), (args, consts)


def _backward(call: _Call, saved: Any, out_grads: list[jax.Array]) -> Any:
    args, consts = saved
    moving = [is_float(leaf) for leaf in args]
    trained = [is_float(leaf) for leaf in consts]

    def local(given: list[jax.Array], consts: list[jax.Array]) -> Any:
        args, out_grads = given[: len(moving)], iter(given[len(moving) :])
        cut = [None if sums else call.tiles(next(out_grads)) for sums in call.sums]
        of_sums, consts = consts[: sum(call.sums)], consts[sum(call.sums) :]

        def one(total: list[jax.Array], tile: Any) -> Any:
            leaves, grads = tile
            scalars = iter(of_sums)
            grads = [next(scalars) if grad is None else grad for grad in grads]
            diff = [leaf for leaf, yes in zip(leaves, moving, strict=True) if yes]
            weights = [const for const, yes in zip(consts, trained, strict=True) if yes]
            run = lambda diff, weights: call.fn(_merged(leaves, moving, diff), _merged(consts, trained, weights))
            arg_grads, const_grads = jax.vjp(run, diff, weights)[1](grads)
            return [a + b.astype(a.dtype) for a, b in zip(total, const_grads, strict=True)], arg_grads

        zeros = [jnp.zeros(const.shape, jnp.float32) for const, yes in zip(consts, trained, strict=True) if yes]
        const_grads, arg_grads = jax.lax.scan(one, zeros, ([call.tiles(leaf) for leaf in args], cut))
        return [call.join(grad) for grad in arg_grads], [call.add_up(grad) for grad in const_grads]

    arrays = [grad for grad, sums in zip(out_grads, call.sums, strict=True) if not sums]
    scalars = [grad for grad, sums in zip(out_grads, call.sums, strict=True) if sums]
    outs = ([call.split.spec] * sum(moving), PartitionSpec())
    run = call.on_pieces(local, len(args) + len(arrays), outs)
    arg_grads, const_grads = run([*args, *arrays], [*scalars, *consts])
    kept = [grad.astype(const.dtype) for grad, const in zip(const_grads, _chosen(consts, trained), strict=True)]
    return _merged([None] * len(args), moving, arg_grads), _merged([None] * len(consts), trained, kept)


_tiled.defvjp(_forward, _backward)


def _chosen(values: list[Any], mask: list[bool]) -> list[Any]:
    return [value for value, yes in zip(values, mask, strict=True) if yes]


def _merged(values: list[Any], mask: list[bool], chosen: list[Any]) -> list[Any]:
    found = iter(chosen)
    return [next(found) if yes else value for value, yes in zip(values, mask, strict=True)]


def _out_specs(call: _Call) -> list[PartitionSpec]:
    return [PartitionSpec() if sums else call.split.spec for sums in call.sums]


def _split(leaves: list[Any], num_tiles: int, axis: str) -> _Split:
    shapes = {leaf.shape[:2] for leaf in leaves}
    if len(shapes) != 1 or any(len(shape) < 2 for shape in shapes):
        found = columns([[f"argument {index}", short(leaf)] for index, leaf in enumerate(leaves)]) or ["no arguments"]
        fix = "Give arrays [batch, length, ...] to the function, and let it close over all else."
        raise ValueError(explain(WHO, "arguments agree on [batch, length]", found=found, fix=fix))
    ((batch, length),) = shapes
    over = (axis,) if status(axis) == "auto" else ()
    pieces = size(over)
    if length % (pieces * num_tiles):
        own = length // pieces
        found = [
            f"length {length}" + (f", {own} on each of {pieces} devices of '{axis}'" if over else ""),
            f"{num_tiles} tiles",
        ]
        legal = ", ".join(str(count) for count in range(1, own + 1) if length % (pieces * count) == 0) or "none: pad the length"
        problem = "tiles are equal parts of a device's positions"
        raise ValueError(explain(WHO, problem, found=found, fix=f"Numbers of tiles that divide: {legal}."))
    mine = tuple(name for name in BATCH_AXES if status(name) == "auto")
    return _Split(mine if over and batch % size(mine) == 0 else (), over, num_tiles)


def _sums(outputs: Any, positions: tuple[int, int]) -> tuple[bool, ...]:
    """Which results are scalars; others keep [B, t]."""
    leaves = jax.tree.leaves(outputs)
    wrong = [short(leaf) for leaf in leaves if leaf.ndim and leaf.shape[:2] != positions]
    if wrong:
        fix = "Return arrays [B, t, ...] of the tile's own positions, or scalars that are sums."
        raise ValueError(explain(WHO, "a tile's results are arrays of its positions, or scalars", found=wrong, fix=fix))
    return tuple(leaf.ndim == 0 for leaf in leaves)
