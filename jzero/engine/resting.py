"""States whose leaves do not all rest on the device: made, copied and checked a bucket at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jzero.engine import compiler, leaves
from jzero.engine.layout import Layout, Options
from jzero.offload import Tier
from jzero.offload import buckets as packing
from jzero.offload.asked import HOST, NVME, Place
from jzero.offload.places import bytes_on_one_device
from jzero.step import TrainStep
from jzero.step import params as parameters

LEAST_FILE_BYTES = 2**22  # of a bucket in files: less would not keep a drive busy


def check(layout: Layout, tiers: Mapping[Place, Tier], fn: Any, leaving: Collection[int] = ()) -> None:
    """Every tier can hold what is to rest there, and host memory the gradients that leave for it: of the leaves `leaving`."""
    still = frozen(layout, fn) if isinstance(fn, TrainStep) else frozenset()
    rows = list(zip(layout.placements, layout.avals, layout.on_device, layout.places, strict=True))
    for place, tier in tiers.items():
        members = [
            (placement.leaf.path, jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding))
            for placement, aval, sharding, where in rows
            if where == place
        ]
        if place.kind == HOST:
            shape = lambda index: jax.ShapeDtypeStruct(layout.avals[index].shape, fn.policy.accumulate)
            for index in leaving:
                path, sharding = layout.placements[index].leaf.path, layout.on_device[index]
                grad = f"the gradient of {path}", shape(index).update(sharding=sharding)
                members += [] if path in still else [grad] * min(fn.accumulate, 2)  # a sum is made beside the last one
        tier.check(members, still)


def frozen(layout: Layout, fn: TrainStep) -> frozenset[str]:
    """The paths of the parameters that do not train, which come first in a TrainState."""
    params = jax.tree.unflatten(layout.treedef, layout.avals).params
    mask = parameters.trainable_mask(params, fn.trainable)
    return frozenset(layout.placements[index].leaf.path for index, trains in enumerate(mask) if not trains)


def placed(given: Sequence[Any], layout: Layout, tiers: Mapping[Place, Tier]) -> list[Any]:
    """Copies of a state's leaves where they rest."""
    rows = zip(given, layout.on_device, layout.places, layout.placements, strict=True)
    return [
        leaves.copy(leaf, sharding) if place is None else tiers[place].place([placement.leaf.path], [leaf], [sharding])[0]
        for leaf, sharding, place, placement in rows
    ]


def init(make: Callable[[Any], Any], traced: Any, layout: Layout, options: Options) -> Any:
    """`make(traced)`, where it rests: first what stays on the device, then the rest a bucket at a time."""
    made: dict[int, Any] = {}
    for part in _parts(layout, options):
        shardings = [layout.on_device[index] for index in part]

        def chosen(traced: Any, part: Sequence[int] = part) -> list[Any]:
            every = jax.tree.leaves(make(traced))
            return [every[index] for index in part]

        arrays = jax.jit(chosen, out_shardings=shardings, compiler_options=compiler.options(options.mesh))(traced)
        made |= zip(part, arrays, strict=True)
        for index in (index for index in part if layout.places[index] is not None):
            (made[index],) = placed([arrays[part.index(index)]], layout.only([index]), options.tiers)
            arrays[part.index(index)].delete()
    return jax.tree.unflatten(layout.treedef, [made[index] for index in range(len(made))])


def _parts(layout: Layout, options: Options) -> list[list[int]]:
    """The numbers of the leaves that are made together."""
    assert options.offload is not None
    size = bucket_bytes(layout, options)
    parts, room = [[index for index, place in enumerate(layout.places) if place is None]], 0
    for index in (index for index, place in enumerate(layout.places) if place is not None):
        needed = bytes_on_one_device(layout.placements[index].leaf, layout.on_device[index])
        if needed > room:
            parts.append([])
            room = size
        parts[-1].append(index)
        room -= needed
    return parts


def bucket_bytes(layout: Layout, options: Options) -> int:
    """As asked; or what the host link wants, and of what rests in files a sixteenth: four buckets of it are in host memory."""
    assert options.offload is not None
    if options.offload.bucket_bytes:
        return options.offload.bucket_bytes
    rows = zip(layout.placements, layout.on_device, layout.places, strict=True)
    in_files = [bytes_on_one_device(one.leaf, sharding) for one, sharding, place in rows if place and place.kind == NVME]
    return in_reach(packing.default_bytes(options.mesh), sum(in_files))


def in_reach(wanted: int, bytes_in_files: int) -> int:
    """A bucket of what rests in files: no more than a sixteenth of it, for a pool has four."""
    return min(wanted, max(bytes_in_files // 16, LEAST_FILE_BYTES)) if bytes_in_files else wanted
