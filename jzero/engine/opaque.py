"""The engine for any `fn(state, *batch) -> (state, aux)`: the program stays the single-device one, with placement added."""

from collections.abc import Callable
from typing import Any

import jax

from jzero import _compat
from jzero._errors import explain
from jzero._types import ALSO_AXES
from jzero.comm import Auto
from jzero.engine.layout import Layout, Options, Trace, check_effects, check_same_state
from jzero.gather import Fact, constrained
from jzero.gather.facts import Reading


def facts_of(layout: Layout) -> list[Fact | None]:
    """What the pass may assume of the state's leaves: parameters and their mirrors, each with its spec."""

    def fact(index: int) -> Fact | None:
        leaf = layout.placements[index].leaf
        tracked = leaf.role in ("params", "opt_state") and len(leaf.shape) > 0
        return Fact(index, layout.split(index), leaf.role == "params", index) if tracked else None

    facts = [fact(index) for index in range(len(layout.placements))]
    return facts if any(fact and fact.is_split for fact in facts) else [None] * len(facts)


def build(fn: Callable[..., Any], layout: Layout, options: Options, traces: list[Trace]) -> Callable[..., Any]:
    """`fn` with a sharding constraint at each use of a sharded leaf, to be jitted under the layout's shardings."""
    reading, comm = Reading(True, dict(options.mesh.shape)), Auto(options.mesh, also=ALSO_AXES)
    facts = facts_of(layout)

    def sharded(state: Any, *batch: Any) -> tuple[Any, Any]:
        with _compat.mesh_shown(options.mesh):
            return in_sight_of_the_mesh(state, *batch)

    def in_sight_of_the_mesh(state: Any, *batch: Any) -> tuple[Any, Any]:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(state, *batch)
        check_result(state, shapes)
        check_effects(jaxpr, options)
        leaves = jax.tree.leaves(batch)
        traces[:] = [Trace(jaxpr=jaxpr, facts=(*facts, *[None] * len(leaves)), reading=reading)]
        out = constrained(jaxpr, traces[0].facts, [*jax.tree.leaves(state), *leaves], reading=reading, comm=comm)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return sharded


def check_result(state: Any, shapes: Any) -> None:
    if not isinstance(shapes, tuple) or len(shapes) != 2:
        fix = "A step is fn(state, *batch) -> (state, aux); return None as aux if there is none."
        raise TypeError(explain("jzero.shard", "the step must return (state, aux)", found=[_got(shapes)], fix=fix))
    check_same_state(state, shapes[0])


def _got(shapes: Any) -> str:
    return f"got a tuple of {len(shapes)}" if isinstance(shapes, tuple) else f"got {type(shapes).__name__}"
