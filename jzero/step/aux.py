"""Aux values of a loss by how they combine over microbatches and shards: averaged scalars, marked sums, arrays by example."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jzero._errors import explain
from jzero._tree import path_name, short
from jzero.step.loss import Summed

Kind = Literal["averaged", "summed", "batched"]


class AuxLayout(NamedTuple):
    """Structure of an aux pytree: one entry per `Summed` or plain leaf, in flattening order."""

    treedef: Any
    kinds: tuple[Kind, ...]


class AuxParts(NamedTuple):
    """Aux values sorted by how they combine."""

    averaged: list[jax.Array]  # float32[]
    summed: list[Any]  # pytrees of arrays
    batched: list[jax.Array]  # [rows, ...]


def layout(aux: Any, num_rows: int | None) -> AuxLayout:
    """How each aux value combines; an array without a batch dim is an error, since its reduction would be a guess."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(aux, is_leaf=_is_summed)
    kinds = tuple(_kind(leaf) for _, leaf in leaves)
    rows = [(path, leaf) for (path, leaf), kind in zip(leaves, kinds, strict=True) if kind == "batched"]
    wrong = [f"aux {path_name(path)}   {short(leaf)}" for path, leaf in rows if leaf.shape[0] != num_rows]
    if wrong:
        fix = "Mark a sum with jzero.summed(x), reduce it to a scalar, or give it a batch dim."
        problem = f"aux arrays must keep the batch dim ({num_rows} rows here)"
        raise ValueError(explain("jzero.make_train_step", problem, found=wrong, fix=fix))
    return AuxLayout(treedef, kinds)


def _is_summed(leaf: Any) -> bool:
    return isinstance(leaf, Summed)


def _kind(leaf: Any) -> Kind:
    return "summed" if _is_summed(leaf) else "averaged" if leaf.ndim == 0 else "batched"


def sort(aux: Any, kinds: tuple[Kind, ...], weight: Any) -> AuxParts:
    """One microbatch's aux, scalars multiplied by its weight."""
    leaves = jax.tree.leaves(aux, is_leaf=_is_summed)
    by_kind: dict[Kind, list[Any]] = {"averaged": [], "summed": [], "batched": []}
    for leaf, kind in zip(leaves, kinds, strict=True):
        by_kind[kind].append(leaf)
    averaged = [jnp.asarray(leaf, jnp.float32) * weight for leaf in by_kind["averaged"]]
    return AuxParts(averaged, [leaf.value for leaf in by_kind["summed"]], by_kind["batched"])


def unsort(parts: AuxParts, shape: AuxLayout) -> Any:
    """The aux pytree again, as the user wrote it, with sums unmarked."""
    queues = {"averaged": iter(parts.averaged), "summed": iter(parts.summed), "batched": iter(parts.batched)}
    return jax.tree.unflatten(shape.treedef, [next(queues[kind]) for kind in shape.kinds])
