"""Parameters that are pieces of their own over `expert`: who they are, and whether only operations that know it touch them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jax.sharding import Mesh

from jzero import _compat
from jzero._specs import entry_of, names, zero_axes
from jzero.engine.layout import Layout
from jzero.gather.facts import Fact, Reading

AXIS = "expert"
KNOWING = "jzero_expert_product"  # `jzero.moe`: takes the experts that are here, and the tokens that were sent to them


def apart(entry: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """Of `axes`, those over which a dim's pieces are never brought together."""
    return () if zero_axes(entry) else tuple(name for name in names(entry) if name in axes)


def used_whole(program: Any, layout: Layout, num_params: int, mesh: Mesh, axes: Sequence[str]) -> list[str]:
    """The lines of a loss that want a parameter whole of which a rule gives each device of a batch axis another piece.

    A shard's own program would compute something else there: so the gradient stays global.
    """
    splits = [tuple(entry_of(apart(entry, axes)) for entry in layout.split(index)) for index in range(num_params)]
    if program is None or not any(map(any, splits)):
        return []
    others = len(_compat.open_jaxpr(program)[0].invars) - num_params
    facts = [Fact(index, split, root=index) if any(split) else None for index, split in enumerate(splits)]
    reading = Reading(False, dict(mesh.shape), frozenset(axes))
    wrong = [use for use in reading.uses(program, (*facts, *(None,) * others)) if use.eqn.primitive.name != KNOWING]
    path = lambda use: layout.placements[use.leaf].leaf.path
    return list(dict.fromkeys(f"{path(use)} is split over the batch's axes and used whole: {_compat.where(use.eqn)}" for use in wrong))


def known(mesh: Mesh) -> AbstractContextManager[None]:
    """Around the tracing of a step under Auto axes: experts look for their axis in the mesh in force."""
    return _compat.known_mesh(mesh) if AXIS in mesh.axis_names else nullcontext()
