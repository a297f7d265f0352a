"""One state in one folder: `jzero.save` and `jzero.restore`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jzero._errors import explain
from jzero.checkpoint import checksums, folder, loss_scale, reading, template, weights, writing
from jzero.checkpoint.changes import NONE, Changes
from jzero.checkpoint.naming import WHO
from jzero.engine import resting
from jzero.engine.layout import Layout
from jzero.shard import ShardedStep
from jzero.step import TrainStep


def save(path: Any, state: Any, *, step: ShardedStep | None = None) -> None:
    """Write `state` into a new folder and wait until it is complete. The folder appears when everything is in it.

    Args:
      path: a folder that does not exist yet, local or any that Orbax writes.
      state: any pytree; each process writes its own pieces. Leaves that are not arrays are left out.
      step: the sharded step, to note its stage and precision beside the arrays.

    Raises:
      FileExistsError: the folder holds something. OSError: it cannot be written.
    """
    where = folder.absolute(path)
    if where.exists() and (not where.is_dir() or any(where.iterdir())):
        fix = "Name a new folder, or use jzero.CheckpointManager(path), which keeps several."
        raise FileExistsError(explain(f"{WHO}: save", "there is something already", found=[str(where)], fix=fix))
    writing.check_writable(where.parent)
    items = writing.items(state, step=step)
    handler = ocp.CompositeCheckpointHandler(state=checksums.Handler(), jzero=ocp.JsonCheckpointHandler())
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(where, args=items, force=where.exists())  # force: an empty folder is no obstacle
    except Exception as error:
        raise writing.failed(error, f"{where} is not there") from error


def restore(
    path: Any, step: ShardedStep, *, cast: bool = False, weights_only: bool = False, into: Any = None,
    rename: Mapping[str, str] | None = None, partial: bool = False, restack: bool = False,
) -> Any:  # fmt: skip
    """The state in `path`, on the step's mesh and stage, whatever wrote it; a manager's folder gives its newest.

    Also a checkpoint that plain Orbax wrote. Every file is compared with its checksum first. Host memory beside the state:
    about an eighth of it, or the largest leaf twice.

    Args:
      path: what `jzero.save` or a `CheckpointManager` wrote, or plain Orbax.
      step: where the state goes. Its structure is that of `into`, or the one the step has seen last (`step.init`, `step.place`,
        `step.shardings(jax.eval_shape(make_state))`); a step that has seen none takes the one the checkpoint describes.
      cast: convert floating-point leaves of another dtype; without it they are an error.
      weights_only: read the parameters only. A TrainStep makes the rest anew, other steps need `into`.
      into: a state whose leaves are kept where none are read; they become the result's, so use it no more.
      rename: regular expression -> replacement, tried on the name of each leaf on disk: `{r"\bencoder/": "backbone/"}`.
      partial: leaves that are not on disk keep their values of `into`, leaves that the state does not have stay on disk; a
        warning lists both.
      restack: read scanned layers (`layers/w [L, ...]`) as unrolled ones (`layers/0/w [...]`), or the other way round.

    Raises:
      FileNotFoundError, ValueError: no checkpoint; leaves that do not match; a newer format; damaged files.
    """
    changes = Changes(rename or {}, partial, restack)
    found = folder.open_one(folder.locate(path))
    return load(found, step, cast=cast, weights_only=weights_only, into=into, changes=changes)


def load(
    found: folder.Found, step: ShardedStep, *, cast: bool = False, weights_only: bool = False, into: Any = None,
    changes: Changes = NONE,
) -> Any:  # fmt: skip
    """Check the files, then read them onto `step`; the arguments are `restore`'s."""
    checksums.check(found.arrays)
    layout, statics = template.of(step, found, into=into, changes=changes)
    if weights_only:
        return weights.load(found, step, layout, statics, cast=cast, into=into, changes=changes)
    settle = None if changes.partial else _settle(step, layout)
    read = reading.read(found, layout, cast=cast, changes=changes, settle=settle)
    if into is None:
        weights.check_known(read, step)
    state = weights.fill(read, layout, statics, into)
    if changes.partial and any(step.options.tiers):
        state = step.place(state)  # leaves of two origins come to rest together
    return loss_scale.begin_anew(state, step, found)


def _settle(step: ShardedStep, layout: Layout) -> Callable[[int, jax.Array], Any] | None:
    """How a leaf that was read comes to rest where the step keeps it, if that is in files."""
    tiers = {place: tier for place, tier in step.options.tiers.items() if tier.can_fail}
    if not tiers:
        return None
    assert isinstance(step.fn, TrainStep)
    resting.check(layout, tiers, step.fn)

    def settle(index: int, array: jax.Array) -> Any:
        place = layout.places[index]
        if place is None or place not in tiers:
            return array
        (placed,) = tiers[place].place([layout.placements[index].leaf.path], [array], [layout.on_device[index]])
        array.delete()
        return placed

    return settle
