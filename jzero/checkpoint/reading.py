"""Arrays from disk onto a mesh: compared by name first, then each device reads its own pieces."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jzero._tree import is_key
from jzero.checkpoint import changes as changing
from jzero.checkpoint import checksums, folder, mismatch, naming
from jzero.checkpoint.changes import Changes, Source
from jzero.checkpoint.naming import Name
from jzero.engine.layout import Layout

_NUM_PORTIONS = 16
_LEAST_PORTION_BYTES = 2**24  # below it the calls themselves would take the time


class Read(NamedTuple):
    """The leaves in order, None where none was read; the names of those, and of what stayed on disk."""

    leaves: list[Any]
    fresh: list[str]
    left: list[str]


class _Wanted(NamedTuple):
    aval: Any
    sharding: NamedSharding


def read(
    found: folder.Found, layout: Layout, *, only: frozenset[str] | None = None, cast: bool = False,
    changes: Changes = changing.NONE, settle: Callable[[int, jax.Array], Any] | None = None,
) -> Read:  # fmt: skip
    """The leaves of `layout` on its shardings; with `only`, those of these roles.

    No device ever holds more of the state than its own pieces, and a few of them twice for a moment: those that are read at
    once, or one stacked leaf whose layers are unrolled. Reads `sum(leaf bytes / pieces)` per device; nothing travels
    between devices. `settle(index, array)` is given each leaf as soon as it is read, and returns what stands for it.

    Raises:
      ValueError: leaves missing, extra, or of another shape or dtype; `CorruptCheckpoint` where reading fails.
    """
    names = naming.names(jax.tree.unflatten(layout.treedef, layout.avals))
    rows = zip(names, layout.avals, layout.shardings, layout.placements, strict=True)
    wanted = {name: _Wanted(aval, where) for name, aval, where, place in rows if only is None or place.leaf.role in only}
    there = changing.renamed(folder.present(found.arrays), changes.rename)
    shapes = {name: naming.stored_shape(one.aval).shape for name, one in wanted.items()}
    sources = changing.sources(shapes, there, restack=changes.restack)
    avals = {name: one.aval for name, one in wanted.items()}
    mismatch.check(avals, there, sources, found, changes=changes, cast=cast, whole=only is None)
    index_of = {name: index for index, name in enumerate(names)}
    arrays = {
        name: array if settle is None else settle(index_of[name], array)
        for name, array in _guarded(_arrays(found.arrays, wanted, sources), found)
    }
    used = {name for source in sources.values() for name in source.names}
    fresh = ["/".join(name) for name in wanted if name not in sources]
    left = [] if only is not None else ["/".join(name) for name, leaf in there.items() if leaf.name not in used]
    return Read([arrays.get(name) for name in names], fresh, left)


def _guarded(arrays: Iterator[tuple[Name, Any]], found: folder.Found) -> Iterator[tuple[Name, Any]]:
    """Names, shapes and dtypes agreed, so what fails now are the files."""
    try:
        yield from arrays
    except Exception as error:
        met = [f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"]
        raise checksums.CorruptCheckpoint(checksums.damaged(found.arrays, "the arrays cannot be read", met)) from error


def _arrays(
    arrays: epath.Path, wanted: Mapping[Name, _Wanted], sources: Mapping[Name, Source]
) -> Iterator[tuple[Name, Any]]:  # fmt: skip
    """Leaf by leaf, in the order in which they are read."""
    plain = {source.names[0]: name for name, source in sources.items() if source.index is None and len(source.names) == 1}
    for names in _portions(list(plain), {name: wanted[plain[name]] for name in plain}):
        asked = {name: wanted[plain[name]] for name in names}
        read = _restore(arrays, {name: (naming.stored_shape(aval), where) for name, (aval, where) in asked.items()})
        for name in names:
            yield plain[name], _own(read.pop(name), *asked[name])
    for name, source in sources.items():
        if len(source.names) > 1:
            yield name, _stack(arrays, source, *wanted[name])
    for stacked in dict.fromkeys(source.names[0] for source in sources.values() if source.index is not None):
        layers = {name: source.index for name, source in sources.items() if source.names == (stacked,)}
        yield from _unstack(arrays, stacked, {name: i for name, i in layers.items() if i is not None}, wanted).items()


def _portions(names: list[Name], wanted: Mapping[Name, _Wanted]) -> Iterator[list[Name]]:
    """Orbax reads all that it is asked for at once, and its buffers are beside the state: a sixteenth at a time."""
    sizes = {name: _local_bytes(wanted[name]) for name in names}
    most = max(sum(sizes.values()) / _NUM_PORTIONS, _LEAST_PORTION_BYTES)
    portion: list[Name] = []
    for name in sorted(names, key=lambda name: -sizes[name]):  # large ones first, while there is room
        if portion and sum(sizes[one] for one in portion) + sizes[name] > most:
            yield portion
            portion = []
        portion.append(name)
    if portion:
        yield portion


def _local_bytes(wanted: _Wanted) -> int:
    stored, sharding = naming.stored_shape(wanted.aval), wanted.sharding
    piece = math.prod(sharding.shard_shape(stored.shape)) * stored.dtype.itemsize
    return piece * len(sharding.addressable_devices)


def _restore(arrays: epath.Path, wanted: Mapping[Name, tuple[jax.ShapeDtypeStruct, NamedSharding]]) -> dict[Name, Any]:
    """Leaves by their names on disk, as Orbax gives them; all others stay there."""
    asked = {name: ocp.ArrayRestoreArgs(sharding=where, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)
             for name, (leaf, where) in wanted.items()}  # fmt: skip
    tree = folder.tree(arrays)
    others = dict.fromkeys(naming.unnest(tree), ocp.PLACEHOLDER)
    item = naming.replace(tree, others | {name: leaf for name, (leaf, _) in wanted.items()})
    how = naming.replace(tree, dict.fromkeys(others, ocp.RestoreArgs()) | asked)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        read = checkpointer.restore(arrays, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    leaves = naming.unnest(read)
    return {name: leaves[name] for name in wanted}


def _own(leaf: Any, aval: Any, sharding: NamedSharding) -> Any:
    """A buffer of jax's own: what was read may lie in memory that cannot be donated, and the next step would double it."""
    words = jax.random.key_data(leaf) if is_key(leaf) else leaf
    owned = jax.device_put(words, sharding, may_alias=False)
    jax.block_until_ready(owned)
    leaf.delete()
    return jax.random.wrap_key_data(owned, impl=naming.key_impl(aval)) if is_key(aval) else owned


def _stack(arrays: epath.Path, source: Source, aval: Any, sharding: NamedSharding) -> Any:
    """One scanned leaf from one leaf for each layer."""
    layer, where = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype), _moved(sharding, sharding.spec[1:])
    layers = _restore(arrays, dict.fromkeys(source.names, (layer, where)))
    stacked = jax.jit(lambda *layers: jnp.stack(layers), out_shardings=sharding)(*layers.values())
    jax.block_until_ready(stacked)
    for leaf in layers.values():
        leaf.delete()
    return stacked


def _unstack(arrays: epath.Path, stacked: Name, layers: Mapping[Name, int], wanted: Mapping[Name, _Wanted]) -> dict[Name, Any]:
    """All unrolled leaves of one scanned one, which is read once."""
    aval, sharding = wanted[next(iter(layers))]
    whole = jax.ShapeDtypeStruct((len(layers), *aval.shape), aval.dtype)
    read = _restore(arrays, {stacked: (whole, _moved(sharding, (None, *sharding.spec)))})[stacked]
    found = {}
    for name, index in layers.items():
        pick = jax.jit(lambda leaf, index: leaf[index], out_shardings=wanted[name].sharding)
        found[name] = jax.block_until_ready(pick(read, index))
    read.delete()
    return found


def _moved(sharding: NamedSharding, spec: Any) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
