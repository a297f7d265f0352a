"""What a place must be able to do to hold a part of the state: the seam between the step's driver and where leaves rest.

A step with offload is several programs. The first computes the gradient and whatever the update needs of all leaves
together; it never sees the leaves that rest elsewhere, parameters apart: those in host memory it fetches itself, those in files
are brought before it. Then the driver (`jzero/offload/stream.py`) walks the buckets, a bucket being some leaves of the state
that are updated together. A `Trip` is what one place has of a bucket, or of what is brought:

    tier.begin(step, trips)                       before the first fetch, with every trip of the step, in order
    arriving = tier.fetch(trip, shardings)        returns at once; called for bucket i + 1 while bucket i is computed
    arrays = arriving.result()                    arrays on the device, or on their way there
    leaving = tier.put_back(trip, arrays)         returns at once; `arrays` are the tier's now, to delete when they are copied
    leaving.result()                              the leaves at rest; the device memory of `arrays` is free again
    tier.settle()                                 every bucket has left: wait until all of it is safe beside the old, or raise
    tier.end()                                    it counts from here on: one consistent whole, or raise
    tier.undo()                                   it does not after all: another place failed to end
    tier.cancel()                                 instead of all this, where the step was skipped or failed

At most two buckets are on the device at any time: the driver asks for bucket i + 2 only after bucket i's `leaving.result()`.
A trip that only comes takes no room in the tier once its `result()` is there; one that also goes keeps its room until it is
safe. All calls come from one thread, in order; what runs beside it is the tier's affair.

A leaf at rest is what `place` returns: for the host tier an ordinary `jax.Array` in `pinned_host`; for a tier of files an
array-like with `shape`, `dtype`, `sharding` (of the array it becomes when fetched) and `__array__`, a pytree leaf like any
other, which knows its own path.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jzero.offload.asked import HOST, NVME, Place


class Trip(NamedTuple):
    """Leaves of one place that travel together in a step. What goes and does not come was on the device already."""

    comes: Sequence[Any]
    goes: Sequence[Any] = ()  # all that come, or none of them


class Moving(Protocol):
    """Leaves on their way."""

    def result(self) -> list[Any]:
        """Wait as long as needed; errors of the journey are raised here."""
        ...


class Tier(Protocol):
    """A place where leaves of the state rest. One per `ShardedStep` and place."""

    @property
    def name(self) -> str:
        """As the report prints it: `pinned_host`, `nvme:/data/swap`."""
        ...

    @property
    def findings(self) -> list[str]:
        """What a reader of the report should know."""
        ...

    def describe(self) -> dict[str, Any]:
        """Figures of this place for the report, as plain data."""
        ...

    def check(self, leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]], still: Collection[str] = ()) -> None:
        """Refuse what cannot be held, before anything is allocated: a five-part error that names the setting to change.

        Args:
          leaves: `(path, leaf)` of everything that is to rest here; each leaf knows its sharding on the device.
          still: paths of those that no step changes (parameters that do not train).
        """
        ...

    def is_here(self, leaf: Any, sharding: jax.sharding.Sharding) -> bool:
        """Whether a leaf of the state rests here already, in the pieces that `sharding` (on the device) says."""
        ...

    def place(self, paths: Sequence[str], leaves: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        """Copies of arrays (from anywhere) at rest here; waits. For `init` (a bucket at a time), `place` and restore."""
        ...

    @property
    def can_fail(self) -> bool:
        """Whether a step may fail here for reasons of its own (a full disk). Then it leaves the state it was given intact."""
        ...

    def begin(self, step: int, trips: Sequence[Trip]) -> None:
        """`step`: updates made so far. `trips`: all that will be fetched, in order; a trip is known by itself from here on."""
        ...

    def fetch(self, trip: Trip, shardings: Sequence[Any]) -> Moving:
        """What comes, onto the device; `shardings` are of these leaves."""
        ...

    def put_back(self, trip: Trip, arrays: Sequence[jax.Array]) -> Moving:
        """`arrays` take the place of what goes, in its order; the old leaves say their paths and buffers."""
        ...

    def settle(self) -> None: ...

    def end(self) -> None: ...

    def undo(self) -> None: ...

    def cancel(self) -> None: ...


def tier(place: Place) -> Tier:
    """The tier of a place. A new kind of place is a new file and a line here."""
    return _MAKERS[place.kind](place)


def _host(place: Place) -> Tier:
    from jzero.offload.host import HostTier

    return HostTier()


def _nvme(place: Place) -> Tier:
    from jzero.offload.nvme.tier import NVMeTier

    return NVMeTier(place.folder)


_MAKERS: dict[str, Callable[[Place], Tier]] = {HOST: _host, NVME: _nvme}
