"""What a place must be able to do to hold a part of the state: the seam between the step's driver and where leaves rest.

A step with offload is several programs. The first computes the gradient and whatever the update needs of all leaves
together; it never sees the leaves that rest elsewhere (`params` in host memory apart, which it fetches at use). Then the driver
(`jzero/offload/stream.py`) walks the buckets, a bucket being some leaves of the state that are updated together:

    tier.begin(step, buckets)                     before the first fetch, with all that will be fetched, in order
    arriving = tier.fetch(leaves, shardings)      returns at once; called for bucket i + 1 while bucket i is computed
    arrays = arriving.result()                    arrays on the device, or on their way there
    leaving = tier.put_back(leaves, arrays)       returns at once; `arrays` are the tier's now, to delete when they are copied
    leaving.result()                              the leaves at rest; the device memory of `arrays` is free again
    tier.end()                                    every bucket has left: make it one consistent whole, or raise
    tier.cancel()                                 instead of it, where the step was skipped or failed

At most two buckets are on the device at any time: the driver asks for bucket i + 2 only after bucket i's `leaving.result()`.
All calls come from one thread, in order; what runs beside it is the tier's affair.

A leaf at rest is what `place` returns: for the host tier an ordinary `jax.Array` in `pinned_host`; for a tier of files an
array-like with `shape`, `dtype`, `sharding` (of the array it becomes when fetched) and `__array__`, a pytree leaf like any
other, which knows its own path.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from jzero.offload.asked import HOST, NVME, Place


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

    def check(self, leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]]) -> None:
        """Refuse what cannot be held, before anything is allocated: a five-part error that names the setting to change.

        Args:
          leaves: `(path, leaf)` of everything that is to rest here; each leaf knows its sharding on the device.
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

    def begin(self, step: int, buckets: Sequence[Sequence[Any]]) -> None:
        """`step`: updates made so far. `buckets`: the leaves that will be fetched together, in order."""
        ...

    def fetch(self, leaves: Sequence[Any], shardings: Sequence[Any]) -> Moving: ...

    def put_back(self, leaves: Sequence[Any], arrays: Sequence[jax.Array]) -> Moving:
        """`leaves` are the old ones at rest, in the same order as `arrays`, for their paths and buffers."""
        ...

    def end(self) -> None: ...

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
