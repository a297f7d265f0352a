"""Where a step's state lives: every leaf's role, spec and sharding, decided once from shapes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding

from jzero import _compat, roles, traffic
from jzero import rules as placing
from jzero._errors import explain
from jzero._specs import without_zero
from jzero._tree import is_float, named_leaves, num_elements, short
from jzero._types import Placement, Role
from jzero.engine.stage_layers import pipe_dims, stacked_layers
from jzero.mesh import axis_size, describe
from jzero.offload import Offload, Tier
from jzero.offload import places as choosing
from jzero.offload.asked import HOST, NVME, Place
from jzero.offload.host import KIND
from jzero.pipeline.schedule import Schedule
from jzero.rules.batch import check_batch
from jzero.stages import Stage


@dataclass(frozen=True)
class Options:
    """What `jzero.shard` was asked for, checked."""

    stage: Stage
    mesh: Mesh
    params: Any = None
    rules: tuple[Any, ...] = ()
    remat: Any = None
    min_shard_elements: int = 1024
    on_indivisible: Literal["replicate", "error"] = "replicate"
    donate: bool = True
    strict: bool = True
    schedule: Schedule | None = None  # of a pipeline of more than one stage
    offload: Offload | None = None
    tiers: Mapping[Place, Tier] = field(default_factory=dict)  # of the places that `offload` names

    saves_on_host: bool = False  # whether the remat policy saves activations in host memory

    @property
    def moves_state(self) -> bool:
        """Whether a part of the state rests off the device, so that the step is several programs."""
        return bool(self.tiers)


@dataclass(frozen=True)
class Layout:
    """The placement of one state structure; leaves in flattening order."""

    treedef: Any
    avals: tuple[jax.ShapeDtypeStruct, ...]
    placements: tuple[Placement, ...]
    mesh: Mesh
    places: tuple[Place | None, ...]  # where each leaf rests; None is the device

    @cached_property
    def shardings(self) -> tuple[NamedSharding, ...]:
        """Where leaves rest; one that is no array there has the sharding of the array that it becomes."""
        kinds = [KIND if place is not None and place.kind == HOST else None for place in self.places]
        return tuple(
            sharding.with_memory_kind(kind) if kind else sharding for sharding, kind in zip(self.on_device, kinds, strict=True)
        )

    @cached_property
    def on_device(self) -> tuple[NamedSharding, ...]:
        """Where leaves are while they are used."""
        return tuple(NamedSharding(self.mesh, placement.spec) for placement in self.placements)

    @cached_property
    def tree(self) -> Any:
        """The shardings as a pytree like the state."""
        return jax.tree.unflatten(self.treedef, self.shardings)

    @property
    def typed(self) -> list[jax.ShapeDtypeStruct]:
        """The leaves with their shardings: a program that is traced with them knows which are in host memory."""
        rows = zip(self.avals, self.shardings, strict=True)
        return [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval, sharding in rows]

    def only(self, chosen: Sequence[int]) -> "Layout":
        """The layout of a list of some of the leaves."""
        pick = lambda values: tuple(values[index] for index in chosen)
        treedef, number = jax.tree.structure([0] * len(chosen)), {index: at for at, index in enumerate(chosen)}
        renumbered = lambda one: one._replace(leaf=one.leaf._replace(owner=number.get(one.leaf.owner)))
        placements = tuple(map(renumbered, pick(self.placements)))
        return Layout(treedef, pick(self.avals), placements, self.mesh, pick(self.places))

    def without_opt_state(self) -> "Layout":
        """The layout of a `TrainState` with None for the optimizer's state."""
        state = jax.tree.unflatten(self.treedef, range(len(self.avals)))._replace(opt_state=None)
        return replace(self.only(jax.tree.leaves(state)), treedef=jax.tree.structure(state))

    @cached_property
    def in_files(self) -> tuple[int, ...]:
        """The numbers of the parameters that rest in files, which no program can take."""
        rows = enumerate(zip(self.placements, self.places, strict=True))
        return tuple(index for index, (one, place) in rows if one.leaf.role == "params" and place and place.kind == NVME)

    def brought(self, dtype: Any) -> "Layout":
        """As a step's first program sees it: those parameters are on the device, in the dtype that it computes in."""
        cast = lambda aval: jax.ShapeDtypeStruct(aval.shape, dtype) if is_float(aval) else aval
        avals = [cast(aval) if index in self.in_files else aval for index, aval in enumerate(self.avals)]
        places = [None if index in self.in_files else place for index, place in enumerate(self.places)]
        return replace(self, avals=tuple(avals), places=tuple(places))

    def fetched(self, state: Any, *, leaving: Collection[int] = ()) -> Any:
        """Inside a program: its leaves that rest in host memory on the device, but those whose numbers are `leaving`.

        A copy happens whether or not something reads it.
        """
        moved = [
            leaf if place is None or index in leaving else jax.device_put(leaf, sharding)
            for index, (leaf, sharding, place) in enumerate(
                zip(jax.tree.leaves(state), self.on_device, self.places, strict=True)
            )
        ]
        return jax.tree.unflatten(self.treedef, moved)

    def split(self, index: int) -> tuple[Any, ...]:
        """A leaf's spec with one entry per dim."""
        spec, ndim = self.placements[index].spec, len(self.avals[index].shape)
        return (*spec, *(None,) * (ndim - len(spec)))

    def num_elements(self, index: int, *, apart: tuple[str, ...] = ()) -> int:
        """Of a leaf; where axes other than ZeRO's and those `apart` split it, of one of their pieces.

        By default what is left is the piece that ZeRO shards, gathers and reduces.
        """
        axes = [name for entry in self.split(index) for name in without_zero(entry)]
        return num_elements(self.avals[index]) // axis_size(self.mesh, [name for name in axes if name not in apart])


@dataclass
class Trace:
    """What tracing a step found out, for the report."""

    manual: bool = False
    findings: list[str] = field(default_factory=list)
    jaxpr: Any = None  # the loss on one microbatch of one shard, or the whole opaque step
    facts: Any = ()
    reading: Any = None  # how the engine read that program
    num_scalars: int = 0  # in the all-reduce that ends the gradient
    pipeline: dict[str, Any] = field(default_factory=dict)  # what a pipeline costs, for the report
    formula: traffic.Table | None = None  # its wire bytes
    to_shards: frozenset[int] = frozenset()  # parameters whose gradients leave an opaque step's first part in shards
    kept: int = 0  # leaves of the state, the first, that the program reads and does not give back
    at_use: frozenset[int] = frozenset()  # parameters that come from host memory at their uses, and whose gradients leave
    choices: Any = ()  # of implementations of operations, with reasons (`pallas_kernels.Choice`)


def layout(state: Any, options: Options, *, opaque: bool) -> Layout:
    """Roles, then rules, for an abstract or concrete state."""
    leaves, treedef = jax.tree.flatten(state)
    avals = tuple(jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
    state = jax.tree.unflatten(treedef, avals)
    stage = options.stage
    params = stage.shard_params_opaque if opaque else stage.shard_params
    sharded: dict[Role, bool] = {"params": params, "opt_state": stage.shard_opt_state}
    leaves = roles.assign(state, params=options.params)
    stacked = stacked_layers(state.params, len(leaves)) if options.schedule is not None else None
    placements = placing.place(
        leaves,
        mesh=options.mesh,
        shard_roles=frozenset(role for role, yes in sharded.items() if yes),
        rules=options.rules,
        min_shard_elements=options.min_shard_elements,
        on_indivisible=options.on_indivisible,
        stacked=stacked,
        pipe_dims=None if stacked is None else pipe_dims(avals, stacked, options.mesh.shape["pipe"]),
    )
    on_device = [NamedSharding(options.mesh, placement.spec) for placement in placements]
    places = choosing.places(options.offload, [placement.leaf for placement in placements], on_device)
    return Layout(treedef, avals, placements, options.mesh, places)


def batch_shardings(batch: Any, mesh: Mesh, accumulate: int) -> Any:
    """Shardings of a batch, checked against the batch axes and the microbatches."""
    check_batch(batch, mesh, accumulate)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, placing.batch_spec(leaf, mesh)), batch)


def check_same_state(before: Any, after: Any) -> None:
    """A step must give back the state it got: same structure, shapes and dtypes."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        found = _apart(before, after)
        fix = "Return (state, aux) with a state of the structure that came in."
        raise TypeError(explain("jzero.shard", "the step returns a state of another structure", found=found, fix=fix))
    rows = zip(named_leaves(before), jax.tree.leaves(after), strict=True)
    wrong = [(path, old, new) for (path, old), new in rows if (old.shape, old.dtype) != (new.shape, new.dtype)]
    if wrong:
        found = [f"{path}   in {short(old)}, out {short(new)}" for path, old, new in wrong]
        fix = "Cast the leaf back inside the step, or make it with the dtype it ends with."
        raise TypeError(explain("jzero.shard", f"the step changes {len(wrong)} leaves of its state", found=found, fix=fix))


def _apart(before: Any, after: Any) -> list[str]:
    """How two structures differ: by leaves if they have not the same, else by their containers."""
    ins, outs = dict(named_leaves(before)), dict(named_leaves(after))
    lost = [f"{path}   {short(leaf)} came in and did not come out" for path, leaf in ins.items() if path not in outs]
    new = [f"{path}   {short(leaf)} came out and was not in" for path, leaf in outs.items() if path not in ins]
    shown = [*lost[:10], *new[:10]]
    more = [f"... {len(lost) + len(new) - len(shown)} more leaves"] if len(lost) + len(new) > len(shown) else []
    return [*shown, *more] or [f"in:  {jax.tree.structure(before)}", f"out: {jax.tree.structure(after)}"]


def check_effects(jaxpr: Any, options: Options) -> None:
    """Ordered effects (`debug.print(ordered=True)`, ordered callbacks) run on one device only."""
    effects = _compat.ordered_effects(jaxpr)
    if effects and options.mesh.size > 1:
        problem = f"ordered effects cannot run on {options.mesh.size} devices"
        context = f"mesh {describe(options.mesh)}; stage {options.stage.number}"
        fix = "Use ordered=False (as jax.debug.print does by default), or move the effect out of the step."
        raise NotImplementedError(explain("jzero.shard", problem, found=sorted(set(effects)), context=context, fix=fix))
