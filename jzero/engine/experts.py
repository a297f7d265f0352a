"""Parameters that are pieces of their own over `expert`: who they are, and whether only operations that know it touch them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jzero import _compat, traffic
from jzero._specs import entry_of, names, zero_axes
from jzero._tree import num_bytes
from jzero.audit import moved
from jzero.engine.layout import Layout
from jzero.gather.facts import Fact, Reading
from jzero.mesh import axis_size, batch_axes

AXIS = "expert"
DISPATCH, COMBINE = "jzero_expert_dispatch", "jzero_expert_combine"
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
    lines = (f"{path(use)} is split over the batch's axes and used whole: {_compat.where(use.eqn)}" for use in wrong)
    return list(dict.fromkeys(lines))


class Exchange(NamedTuple):
    """One all-to-all of a loss over `expert`, as its forward pass has it."""

    num_bytes: int  # of one device's side
    times: int  # a microbatch, backward pass included
    rows: int  # of which it is
    choices: int  # rows that are there at least


def exchanges(program: Any, mesh: Mesh) -> list[Exchange]:
    """The all-to-alls that the experts of a loss need. Rows go there and back, and so do their gradients."""
    found: list[Exchange] = []
    for eqn, trips, in_remat in _operations(program):
        place, name = eqn.params["place"], eqn.primitive.name
        if place.num_devices == 1:
            continue
        parts = 1 if place.mesh is None else axis_size(mesh, batch_axes(mesh))
        rows = (eqn.outvars if name == DISPATCH else eqn.invars)[0].aval
        choices = eqn.invars[1].aval.size // parts
        times = trips * (3 if in_remat else 2)
        num_rows = rows.size // rows.shape[-1] // parts
        found.append(Exchange(num_bytes(rows) // parts, times, num_rows, choices))
        if name == DISPATCH and eqn.params["capacity"] is None:
            num_experts = eqn.params["num_experts"]
            found.append(Exchange(4 * num_experts, times - trips, num_experts, num_experts))
    return found


def wire(found: Sequence[Exchange], mesh: Mesh, num_micro: int) -> traffic.Table:
    """Their bytes per device and step."""
    num_devices = axis_size(mesh, AXIS)
    total = sum(moved("all-to-all", one.num_bytes, num_devices) * one.times for one in found) * num_micro
    return {AXIS: {"all-to-all": total}} if total else {}


def findings(found: Sequence[Exchange]) -> list[str]:
    """How much of an exchange is room that may stay empty."""
    padded = [one for one in found if one.rows > one.choices]
    return list(
        dict.fromkeys(
            f"experts exchange {one.rows} rows for {one.choices} choices of tokens: room for all that may fall on one device"
            for one in padded
        )
    )


def _operations(program: Any, trips: int = 1, in_remat: bool = False) -> Iterator[tuple[Any, int, bool]]:
    """The dispatches and combines of a program, with how often they run and whether the backward pass runs them again."""
    for eqn in _compat.open_jaxpr(program)[0].eqns:
        if eqn.primitive.name in (DISPATCH, COMBINE):
            yield eqn, trips, in_remat
            continue
        rounds = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        again = in_remat or eqn.primitive.name in ("remat", "remat2", "checkpoint")
        for inner in _compat.inner_jaxprs(eqn):
            yield from _operations(inner, trips * rounds, again)
