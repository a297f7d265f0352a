"""`params=`: the user says which subtree is the parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jzero._errors import explain
from jzero._tree import leaves_with_path, path_parts
from jzero.roles.ambiguous import tree
from jzero.roles.entries import Entry, Parts


def chosen(state: Any, params: Callable[[Any], Any], found: Sequence[Entry]) -> dict[int, Parts]:
    """Index of each leaf that `params(state)` returns, and its path in what was returned.

    The callable gets the state itself with tracers as leaves: each is one object, so what comes back tells which leaves were
    taken, filters like `eqx.is_array` see arrays, and nothing is allocated.
    """
    treedef = jax.tree.structure(state)
    picked: list[tuple[Parts, Any, int | None]] = []

    def look(*leaves: Any) -> None:
        number = {id(leaf): i for i, leaf in enumerate(leaves)}
        subtree = params(jax.tree.unflatten(treedef, leaves))
        picked.extend((path_parts(path), leaf, number.get(id(leaf))) for path, leaf in leaves_with_path(subtree))

    try:
        jax.eval_shape(look, *(jax.ShapeDtypeStruct(entry.shape, entry.dtype) for entry in found))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(_failed(f"params= raised {type(error).__name__}: {error}", [], found)) from error
    if not picked:
        raise ValueError(_failed("params= returned no leaves", [], found))
    strange = [f"{'/'.join(parts) or 'it returned'}: {type(leaf).__name__}" for parts, leaf, index in picked if index is None]
    if strange:
        raise ValueError(_failed("params= returned values that are no leaves of the state", strange, found))
    return {index: parts for parts, _, index in picked if index is not None}


def _failed(problem: str, lines: Sequence[str], found: Sequence[Entry]) -> str:
    fix = 'Return a subtree of the state as it is: params=lambda state: state["..."]'
    return explain("jzero.shard", problem, found=lines, context=tree(found), fix=fix)
