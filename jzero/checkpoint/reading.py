"""Arrays from disk onto a mesh: compared by name first, then each device reads its own pieces."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

from jzero._errors import columns, explain
from jzero._tree import is_key, short
from jzero.checkpoint import checksums, folder, naming
from jzero.checkpoint.naming import WHO, Name
from jzero.engine.layout import Layout

_SHOWN = 20  # lines of a mismatch; more say less


def read(found: folder.Found, layout: Layout, *, only: frozenset[str] | None = None, cast: bool = False) -> list[Any]:
    """The leaves of `layout` in order, on its shardings; with `only`, None for leaves of other roles.

    No device ever holds more of the state than its own pieces, and one leaf twice for a moment. Reads
    `sum(leaf bytes / pieces)` per device; nothing travels between devices.

    Raises:
      ValueError: leaves missing, extra, or of another shape or dtype; `CorruptCheckpoint` where reading fails.
    """
    abstract = jax.tree.unflatten(layout.treedef, layout.avals)
    rows = zip(naming.names(abstract), layout.avals, layout.shardings, layout.placements, strict=True)
    wanted = {name: (aval, sharding) for name, aval, sharding, where in rows if only is None or where.leaf.role in only}
    _check(wanted, found, cast=cast, partial=only is not None)
    arrays = _restore(found.arrays, wanted, partial=only is not None)
    return [arrays.get(name) for name in naming.names(abstract)]


def _restore(arrays: epath.Path, wanted: Mapping[Name, tuple[Any, NamedSharding]], *, partial: bool) -> dict[Name, Any]:
    stored = {name: naming.stored_shape(aval) for name, (aval, _) in wanted.items()}
    args = {
        name: ocp.ArrayRestoreArgs(sharding=wanted[name][1], global_shape=leaf.shape, dtype=leaf.dtype, strict=True)
        for name, leaf in stored.items()
    }
    try:
        tree = naming.nest(stored) if partial else folder.tree(arrays)
        item, how = (naming.replace(tree, flat) for flat in (stored, args))
        asked = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=partial)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            read = naming.unnest(checkpointer.restore(arrays, args=asked))
    except Exception as error:  # names, shapes and dtypes agreed, so what fails now are the files
        met = [f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"]
        raise checksums.CorruptCheckpoint(checksums.damaged(arrays, "the arrays cannot be read", met)) from error
    return {name: _own(read.pop(name), aval, sharding) for name, (aval, sharding) in wanted.items()}


def _own(leaf: Any, aval: Any, sharding: NamedSharding) -> Any:
    """A buffer of jax's own: what was read may lie in memory that cannot be donated, and the next step would double it."""
    words = jax.random.key_data(leaf) if is_key(leaf) else leaf
    owned = jax.device_put(words, sharding, may_alias=False)
    jax.block_until_ready(owned)
    leaf.delete()
    return jax.random.wrap_key_data(owned, impl=naming.key_impl(aval)) if is_key(aval) else owned


def _check(wanted: Mapping[Name, tuple[Any, Any]], found: folder.Found, *, cast: bool, partial: bool) -> None:
    there = folder.present(found.arrays)
    keys = {tuple(leaf["name"]): leaf["key"] for leaf in found.notes.get("leaves", ())}
    missing = [[_slashed(name), short(aval), "missing on disk"] for name, (aval, _) in wanted.items() if name not in there]
    extra = (
        [] if partial else [[_slashed(name), _short(there[name]), "not in the state"] for name in there if name not in wanted]
    )
    apart = [
        [_slashed(name), _short(there[name]), f"the step expects {short(aval)}"]
        for name, (aval, _) in wanted.items()
        if name in there and _differs(there[name], aval, keys.get(name), cast=cast)
    ]
    rows = [*missing, *extra, *apart]
    if not rows:
        return
    problem = f"{len(rows)} leaves do not match: {len(missing)} missing, {len(extra)} extra, {len(apart)} differ"
    more = [f"... {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    raise ValueError(
        explain(f"{WHO}: restore", problem, found=[*columns(rows[:_SHOWN]), *more], context=f"checkpoint {found.root}",
                fix=_way_out(missing, extra, there, wanted, apart))
    )  # fmt: skip


def _differs(there: Any, aval: Any, key: str | None, *, cast: bool) -> bool:
    stored = naming.stored_shape(aval)
    other_key = is_key(aval) and key is not None and key != naming.key_impl(aval)
    both_float = all(jax.numpy.issubdtype(np.dtype(leaf.dtype), jax.numpy.floating) for leaf in (there, stored))
    other_dtype = np.dtype(there.dtype) != stored.dtype and not (cast and both_float)
    return tuple(there.shape) != stored.shape or other_key or other_dtype


def _way_out(missing: list[Any], extra: list[Any], there: Any, wanted: Any, apart: list[Any]) -> str:
    same_shapes = (
        tuple(there[name].shape) == naming.stored_shape(aval).shape for name, (aval, _) in wanted.items() if name in there
    )
    only_dtypes = not missing and not extra and all(same_shapes)
    if apart and only_dtypes:
        return "Pass cast=True to convert floating-point leaves to the step's precision."
    fix = "Restore with the model and optimizer that wrote it; weights_only=True leaves the optimizer's leaves out."
    pairs = [(ours[0], theirs[0]) for ours in missing for theirs in extra if ours[1] == theirs[1]][:1]
    for ours, theirs in pairs:
        fix += (
            f"\nIf {theirs} is {ours} under an old name: read it with Orbax, rename it in the dict, and step.place the result."
        )
    return fix


def _slashed(name: Name) -> str:
    return "/".join(name)


def _short(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
