"""Offload for a step that jzero did not write: its program is cut where the optimizer's arrays enter (`jzero/offload/cut.py`).

The first part fetches parameters that rest in host memory, is sharded as the whole step would be (`engine/opaque.py`) and gives
out what the second needs. That is the update, in buckets of leaves that depend on each other. Nothing of it is known by name:
what a gradient is shows in its use.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from jzero import _compat
from jzero._tree import num_bytes, short
from jzero.engine import offloaded, opaque
from jzero.engine.layout import Layout, Options
from jzero.engine.offloaded import Carried, Update
from jzero.gather.away import Space, moved
from jzero.offload import cut as cutting
from jzero.offload import split as splitting
from jzero.offload.cut import Cut
from jzero.offload.places import can_go
from jzero.offload.split import Input, Split

LARGE_BYTES = 2**20  # of what is no leaf's own: worth a word in the report


@dataclass(frozen=True)
class OpaqueUpdate(Update):
    """What such a step does with the optimizer's arrays. Trained leaves are all that it makes new from them and that rest on
    the device: parameters, averages of them and the like.
    """

    cut: Cut | None = None
    results: Any = None  # shapes of what the step returns
    of_leaves: tuple[tuple[int, int], ...] = ()  # what is handed over for one leaf: the leaf, the place in `cut.handed`
    of_all: tuple[int, ...] = ()  # the rest of it, by place
    choices: Any = ()  # of implementations of operations, recorded while the step was traced

    @cached_property
    def trained(self) -> list[int]:
        assert self.cut is not None
        return list(self.cut.updated)

    @cached_property
    def arrays(self) -> list[int]:
        return arrays_of(self.layout)

    @cached_property
    def scalars(self) -> list[int]:
        return []  # the first part gives back every leaf that is not in a bucket

    @cached_property
    def grads(self) -> list[tuple[int, jax.ShapeDtypeStruct]]:
        return [(index, self._handed(at)) for index, at in self.of_leaves]

    @cached_property
    def shared(self) -> list[jax.ShapeDtypeStruct]:
        return [self._handed(at) for at in self.of_all]

    def _handed(self, at: int) -> jax.ShapeDtypeStruct:
        assert self.cut is not None
        return jax.ShapeDtypeStruct(self.cut.handed[at].aval.shape, self.cut.handed[at].aval.dtype)

    def rest(self, state: Any) -> list[Any]:
        """The leaves that the first part sees."""
        every = jax.tree.leaves(state)
        return [every[index] for index in self.kept]

    @cached_property
    def rest_layout(self) -> Layout:
        return self.layout.only(self.kept)

    @property
    def carried_shardings(self) -> Carried:
        """Where what is handed over is to be: beside the leaf that it is for, or whole on every device."""
        whole = NamedSharding(self.layout.mesh, PartitionSpec())
        beside = [self.layout.on_device[index] for index, _ in self.of_leaves]
        return Carried(beside, [], None, [whole] * len(self.of_all), [])  # pyrefly: ignore[bad-argument-type]

    @property
    def reduced_to_shards(self) -> frozenset[int]:
        """Which leaves of `kept` are parameters whose gradients leave the first part in shards."""
        split = {index for index, _ in self.of_leaves if not self.layout.on_device[index].is_fully_replicated}
        owners = {self.layout.placements[index].leaf.owner for index in split}
        return frozenset(at for at, index in enumerate(self.kept) if index in owners)

    def first(self, kept: Sequence[Any], *batch: Any) -> tuple[list[Any], Any]:
        """The first part: the leaves that it sees, new where it can, what the step returns, and what the buckets need."""
        cut = self.cut
        assert cut is not None
        num_results = len(cut.jaxpr.outvars) - cut.num_state
        new = [index for index in self.kept if index not in set(self.trained)]
        outputs = [index in set(new) for index in range(cut.num_state)] + [True] * num_results
        part, used = cut.first(outputs)
        is_here = [self.layout.places[index] is None for index in self.kept]
        here = [leaf if yes else moved(leaf, Space.Device) for leaf, yes in zip(kept, is_here, strict=True)]
        given = dict(zip([cut.state[index] for index in self.kept], here, strict=True))
        values = [*cut.consts, *(given.get(var) for var in cut.state), *jax.tree.leaves(batch)]
        needed = [value for value, keep in zip(values, used, strict=True) if keep]
        assert all(value is not None for value in needed), "a leaf that rests elsewhere is in the first part"
        found = _compat.evaluate(part, needed)
        numbers = dict(zip(self.kept, kept, strict=True)) | dict(zip(new, found, strict=False))
        results, handed = found[len(new) : len(new) + num_results], found[len(new) + num_results :]
        pick = lambda places: [handed[at] for at in places]
        carried = Carried(pick(at for _, at in self.of_leaves), [], None, pick(self.of_all), [])  # pyrefly: ignore[bad-argument-type]
        return [numbers[index] for index in self.kept], (jax.tree.unflatten(jax.tree.structure(self.results), results), carried)


def arrays_of(layout: Layout) -> list[int]:
    """The numbers of the optimizer's arrays: whether or not all of them go, the first part sees none."""
    rows = enumerate(layout.placements)
    return [index for index, one in rows if one.leaf.role == "opt_state" and can_go(one.leaf)]


def prepare(fn: Callable[..., Any], layout: Layout, options: Options, batch: tuple[Any, ...]) -> OpaqueUpdate:
    """The step traced, cut and packed into buckets. Nothing is allocated; a step that cannot be cut is an error.

    Args:
      fn: the step on arrays alone.
    """
    state = jax.tree.unflatten(layout.treedef, layout.avals)
    device = options.mesh.devices.flat[0]
    with (
        _compat.mesh_shown(options.mesh),
        pallas_kernels.target(device.device_kind, options.mesh.size),
        pallas_kernels.recording() as choices,
    ):
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(state, *batch)
        opaque.check_result(state, shapes)
        paths = [f"aux{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(shapes[1])]
        cut = cutting.cut(jaxpr, len(layout.avals), arrays_of(layout), paths)
        bare = OpaqueUpdate(
            layout, (), None, [], 0, None, 0, cut=cut, results=shapes[1], choices=tuple(choices),  # pyrefly: ignore[bad-argument-type]
        )  # fmt: skip
        return _with_buckets(bare, options)


def _with_buckets(bare: OpaqueUpdate, options: Options) -> OpaqueUpdate:
    cut, layout = bare.cut, bare.layout
    assert cut is not None
    chosen = {*bare.trained, *bare.arrays}
    part, inputs = cut.second([at in chosen for at in range(len(cut.jaxpr.outvars))])
    node_of, names = _nodes(bare)
    number_of = {var: index for index, var in enumerate(cut.state)}
    nodes = [node_of.get(number_of[var]) if var in number_of else None for var in inputs]
    num_params = sum(layout.placements[index].leaf.role == "params" for index in bare.trained)
    owners = [node_of[index] for index in sorted(chosen)]
    found = splitting.split(part, [Input(node, node is not None) for node in nodes], num_params, names, owners=owners)
    readers = dict(zip(sorted(chosen), cutting.handed_to(part, inputs, cut.handed), strict=True))
    group_of = {node: number for number, group in enumerate(found.groups) for node in group}
    of_leaves, of_all = _apart(bare, {index: group_of[node] for index, node in node_of.items()}, readers)
    plan = replace(bare, of_leaves=of_leaves, of_all=of_all)
    jaxpr, consts = _update(plan, part, inputs, sorted(chosen))
    plan = replace(plan, split=Split(jaxpr, consts, [], found.groups, []))
    return _told(offloaded.packed(plan, node_of, options))


def _nodes(bare: OpaqueUpdate) -> tuple[dict[int, int], list[str]]:
    """The node of each leaf that a bucket makes new, which is its parameter's if it mirrors one, and those of parameters are
    first; and the names of all nodes.
    """
    node_of: dict[int, int] = {}
    names: list[str] = []
    leaf_of = lambda index: bare.layout.placements[index].leaf
    for index in sorted((*bare.trained, *bare.arrays), key=lambda index: leaf_of(index).role != "params"):
        leaf = leaf_of(index)
        if leaf.owner in node_of and leaf.owner != index:
            node_of[index] = node_of[leaf.owner]
        else:
            node_of[index] = len(names)
            names.append(leaf.path)
    return node_of, names


def _apart(
    bare: OpaqueUpdate, group_of: dict[int, int], readers: dict[int, int]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:  # fmt: skip
    """Of what is handed over: what one group reads and what has the shape of a leaf of it, with that leaf; and all else.

    Args:
      readers: for each leaf what its new value reads of it, as bits.
    """
    assert bare.cut is not None
    order, avals, placed = [*bare.trained, *bare.arrays], bare.layout.avals, bare.layout.on_device
    of_leaves, of_all = [], []
    for at, var in enumerate(bare.cut.handed):
        groups = {group_of[index] for index, bits in readers.items() if bits >> at & 1}
        alike = [index for index in order if group_of[index] in groups and avals[index].shape == var.aval.shape != ()]
        if len(groups) == 1 and alike:  # with the leaf of most pieces: moments are split where parameters are whole
            of_leaves.append((min(alike, key=lambda index: math.prod(placed[index].shard_shape(avals[index].shape))), at))
        else:
            of_all.append(at)
    return tuple(sorted(of_leaves, key=lambda pair: order.index(pair[0]))), tuple(of_all)


def _update(plan: OpaqueUpdate, part: Any, inputs: Sequence[Any], numbers: Sequence[int]) -> tuple[Any, list[Any]]:
    """The second part with the inputs and outputs that an update has; and its constants.

    Args:
      numbers: of the leaves that `part` gives out.
    """
    cut = plan.cut
    assert cut is not None

    def run(params: list[Any], grads: list[Any], arrays: list[Any], shared: list[Any]) -> list[Any]:
        given = dict(zip(cut.jaxpr.invars, cut.consts, strict=False))
        given |= zip([cut.state[index] for index in (*plan.trained, *plan.arrays)], [*params, *arrays], strict=True)
        places = (*(at for _, at in plan.of_leaves), *plan.of_all)
        given |= zip([cut.handed[at] for at in places], [*grads, *shared], strict=True)
        found = dict(zip(numbers, _compat.evaluate(part, [given[var] for var in inputs]), strict=True))
        return [found[index] for index in (*plan.trained, *plan.arrays)]

    aval = lambda index: plan.layout.avals[index]
    grads = [one for _, one in plan.grads]
    jaxpr = jax.make_jaxpr(run)([*map(aval, plan.trained)], grads, [*map(aval, plan.arrays)], plan.shared)
    return _compat.without_constants(_compat.inlined(jaxpr))


def _told(plan: Any) -> Any:
    """With a word about arrays that all buckets get, whole on every device."""
    large = [aval for aval in plan.shared if num_bytes(aval) > LARGE_BYTES]
    if not large:
        return plan
    told = f"{len(large)} arrays of {sum(map(num_bytes, large)):,} bytes are whole on every device while buckets are updated: "
    told += f"the first is {short(large[0])}, of the shape of no leaf that needs it"
    return replace(plan, computed=replace(plan.computed, findings=[*plan.computed.findings, told]))
