"""`jzero.CheckpointManager`: checkpoints of one run, written beside training and restored onto any step."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jzero._errors import explain
from jzero.checkpoint import checksums, discard, folder, lock, once, position, writing
from jzero.checkpoint.changes import Changes
from jzero.checkpoint.naming import WHO
from jzero.shard import ShardedStep

_TIMEOUT_SECONDS = 3600  # Orbax gives a background save up after 600, which slow network disks need


class _Best(NamedTuple):
    metric: str
    mode: Literal["min", "max"]


class CheckpointManager:
    """Checkpoints of one run in one folder, a subfolder each: `path/500`, `path/1000`.

    Nothing is written or made until the first `save`; restoring needs no permission to write. `restored` is the number of the
    checkpoint that `restore` read last, None before.

    Args:
      path: a local folder, or any path that Orbax reads (`gs://...`).
      every: `save(i, ...)` skips unless `i % every == 0`; None never skips.
      keep: how many to keep; None keeps all. With `best` the best ones, and the newest in any case.
      best: the metric that decides what is kept: `"loss"`, smaller is better; `"+accuracy"`, larger is better. Its value comes
        with each save: `manager.save(i, state, metrics={"loss": loss})`.
      step: the sharded step, to note its stage and precision beside the arrays; `restore` sets it too, and where neither
        was done they are those of the one step that has made such a state.
      on_error: what becomes of a save that cannot be written, as on a full disk: "raise", or "warn" and train on. The
        checkpoints before it are whole in either case.

    Example:
      >>> manager = CheckpointManager("runs/a", every=500, keep=3)
      >>> manager.steps()
      []
    """

    def __init__(
        self, path: Any, *, every: int | None = None, keep: int | None = None, best: str | None = None,
        step: ShardedStep | None = None, on_error: Literal["raise", "warn"] = "raise",
    ):  # fmt: skip
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                fix = "Write a whole number of at least 1, or leave it out."
                raise ValueError(
                    explain(f"{WHO}: CheckpointManager", f"{name}= is a count", found=[f"{name}={value!r}"], fix=fix)
                )
        if on_error not in ("raise", "warn"):
            fix = "Write on_error='warn' to train on when a checkpoint cannot be written."
            met = [f"on_error={on_error!r}"]
            raise ValueError(explain(f"{WHO}: CheckpointManager", "unknown on_error=", found=met, fix=fix))
        self.path, self._on_error = folder.absolute(path), on_error
        self._every, self._keep, self._best, self._step = every, keep, _best(best), step
        self._orbax: ocp.CheckpointManager | None = None
        self._written: set[int] = set()  # by this manager, so a second save of one step is the same state
        self.restored: int | None = None  # the number that `restore` read last

    def save(self, i: int, state: Any, data: Any = None, force: bool = False, *, metrics: dict[str, Any] | None = None) -> bool:
        """Save `state` as checkpoint `i`, in the background; whether one was begun.

        Returns when the state is copied to host memory, so the next step may donate it. The checkpoint appears under its name
        when all of it is written. A save that is still under way is waited for first. Call it in every process, and `wait`
        before the program ends: Python would end without it.

        Args:
          i: the number of the step.
          state: any pytree; each process writes its own pieces.
          data: an object with `get_state()`, or its position as JSON values.
          force: save whatever `every` says, as before the job ends.
          metrics: numbers; must hold the one that `best=` names.

        Raises:
          FileExistsError: another run wrote checkpoint `i` here. BlockingIOError: another job is writing into this folder.
          OSError: it cannot be written, or the save before failed.
        """
        if (self._every and i % self._every and not force) or i in self._written:
            return False
        values = _numbers(metrics, self._best)
        items = writing.items(state, step=self._step, number=i, data=data)
        self.wait()
        orbax = self._open()
        self._make_room(orbax, i)
        try:
            orbax.save(i, args=items, metrics=values, force=True)
        except Exception as error:
            self._fail(error)
            return False
        self._written.add(i)
        return True

    def restore(
        self, step: ShardedStep, *, at: int | None = None, weights_only: bool = False, data: Any = None,
        cast: bool = False, into: Any = None, rename: Mapping[str, str] | None = None, partial: bool = False,
        restack: bool = False, on_corrupt: Literal["error", "previous"] = "error",
    ) -> tuple[Any, Any]:  # fmt: skip
        """`(state, data)`: the newest complete checkpoint, on the step's mesh and stage, whatever wrote it.

        Args:
          step: where the state goes; see `jzero.restore` for how its structure is known.
          at: the number of the checkpoint, if not the newest.
          weights_only: read the parameters only. A TrainStep makes the rest anew, other steps need `into`; data is None.
          data: an iterator with `set_state(position)`: it is moved and returned. Without it the position is returned.
          cast, into, rename, partial, restack: see `jzero.restore`.
          on_corrupt: "previous" goes back, with a warning, to the newest checkpoint whose files are whole.

        Raises:
          FileNotFoundError: no complete checkpoint, or none of step `at`. ValueError: leaves that do not match, a newer format,
          `CorruptCheckpoint` for damaged files.
        """
        if on_corrupt not in ("error", "previous"):
            fix = "Write on_corrupt='previous' to fall back to an older checkpoint."
            raise ValueError(explain(f"{WHO}: restore", "unknown on_corrupt=", found=[f"on_corrupt={on_corrupt!r}"], fix=fix))
        self.wait()
        number, changes = folder.pick(self.path, at), Changes(rename or {}, partial, restack)
        while True:
            try:
                found = folder.open_one(self.path / str(number))
                state = once.load(found, step, cast=cast, weights_only=weights_only, into=into, changes=changes)
                break
            except checksums.CorruptCheckpoint as error:
                older = [there for there in self.steps() if there < number]
                if on_corrupt == "error" or not older:
                    raise
                warnings.warn(f"{error}\nFalling back from checkpoint {number} to {older[-1]}.", stacklevel=2)
                number = older[-1]
        self._step, self.restored = step, number
        positions = None if weights_only else found.notes.get("data")
        return state, None if positions is None else position.set_position(data, position.own(positions))

    def wait(self) -> None:
        """Return when every save under way is complete, or raise what made it fail."""
        if self._orbax is not None:
            try:
                self._orbax.wait_until_finished()
            except Exception as error:
                self._fail(error)
            discard.empty(self.path)

    def close(self) -> None:
        """`wait`, then let other jobs write into the folder, as the end of the process does. A later `save` opens it again."""
        self.wait()
        discard.empty(self.path).join()
        self._shut()

    def steps(self) -> list[int]:
        """The numbers of the complete checkpoints, oldest first."""
        return folder.steps(self.path)

    def _open(self) -> ocp.CheckpointManager:
        if self._orbax is None:
            writing.check_writable(self.path)
            lock.acquire(self.path, self.close)
            handlers = {folder.STATE: checksums.Handler(), folder.NOTES: ocp.JsonCheckpointHandler()}
            self._orbax = ocp.CheckpointManager(self.path, item_handlers=handlers, options=self._options())
        return self._orbax

    def _options(self) -> ocp.CheckpointManagerOptions:
        best, value, kept = self._best, None, []
        if best is not None:
            value = lambda metrics: metrics[best.metric]
            kept = [policies.BestN(get_metric_fn=value, reverse=best.mode == "min", n=self._keep), policies.LatestN(1)]
        return ocp.CheckpointManagerOptions(
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT_SECONDS),
            todelete_subdir=discard.folder_for(self.path),
            cleanup_tmp_directories=True,  # what a killed job left half-written
            best_fn=value,
            best_mode="min" if best is None else best.mode,
            preservation_policy=policies.AnyPreservationPolicy(kept) if kept else policies.LatestN(self._keep),
        )

    def _shut(self) -> None:
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None
            lock.release(self.path)

    def _make_room(self, orbax: ocp.CheckpointManager, i: int) -> None:
        """A run that went back to an older checkpoint writes the later ones again; nobody else overwrites."""
        if i not in self.steps():
            return
        if self.restored is None or i <= self.restored:
            fix = "Restore first and go on from there, or use a folder of its own for every run."
            context = f"restored here: {self.restored}; steps there: {', '.join(map(str, self.steps()))}"
            problem = f"checkpoint {i} exists, and this run did not write it"
            raise FileExistsError(explain(f"{WHO}: save", problem, found=[str(self.path / str(i))], context=context, fix=fix))
        discard.empty(self.path).join()  # an older one of this number would be in the way
        orbax.delete(i)

    def _fail(self, error: Exception) -> None:
        """A save left no checkpoint, and those before it are whole: raise or warn, as asked.

        Orbax is started anew by the next save, which removes what was half-written: on a full disk it would be in the way.
        """
        self._written &= set(self.steps())
        if jax.process_count() == 1:  # of several, the others may not know of it
            self._shut()
        failure = writing.failed(error, f"folder {self.path}; complete: {', '.join(map(str, self.steps())) or 'none'}")
        if self._on_error == "raise":
            raise failure from error
        warnings.warn(str(failure), stacklevel=3)


def _best(best: str | None) -> _Best | None:
    if best is None:
        return None
    if not isinstance(best, str) or not best.lstrip("+"):
        fix = "Write best='loss' (smaller is better) or best='+accuracy' (larger is better)."
        raise ValueError(explain(f"{WHO}: CheckpointManager", "best= names a metric", found=[f"best={best!r}"], fix=fix))
    return _Best(best.lstrip("+"), "max" if best.startswith("+") else "min")


def _numbers(metrics: dict[str, Any] | None, best: _Best | None) -> dict[str, float] | None:
    values = {name: float(np.asarray(value)) for name, value in (metrics or {}).items()}
    if best is not None and not math.isfinite(values.get(best.metric, math.nan)):
        met = [f"metrics={metrics!r}"]
        fix = f"Write manager.save(i, state, metrics={{{best.metric!r}: value}}), with a finite number."
        raise ValueError(explain(f"{WHO}: save", f"best={best.metric!r} needs its value with every save", found=met, fix=fix))
    return values or None
