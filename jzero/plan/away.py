"""What a job has off the device: bytes per device, bucket by bucket, and what of it is where at a time.

`offloads.py` finds it, from the engine's rules.
"""

from typing import NamedTuple

from jzero.engine.computing import Load
from jzero.offload.nvme.tier import NUM_LANES
from jzero.plan.at_use import Uses


class Trip(NamedTuple):
    """One bucket's way: bytes per device and direction, by place, and in how many pieces it goes."""

    host: int
    disk: int
    load: Load
    num: int = 1
    in_program: bool = False  # slices of host memory that the update's own program takes, in turns with their way back
    here: int = 0  # of `disk`, what only leaves: parameters that were brought for the gradient and are still there
    by_host: bool = False  # updated there: what moves is `load`'s

    @property
    def read(self) -> int:
        """From the drive."""
        return self.disk - self.here

    @property
    def held(self) -> int:
        """What of it is on the device when it has arrived."""
        return 0 if self.in_program or self.by_host else (self.host + self.read) // self.num

    @property
    def worked(self) -> int:
        """What the update's program has of it beyond that: a slice that arrives while another leaves, and gradients that were
        in host memory; or for the host gradients and parameters as they go, and as these come back.
        """
        if self.by_host:
            return (self.load.out + self.load.beside) // self.num
        return (2 * self.host * self.in_program + self.load.grads_there) // self.num

    @property
    def sent(self) -> int:
        """By the longer way: to the host where that updates, else to the device."""
        return self.load.out if self.by_host else self.load.into

    @property
    def back(self) -> int:
        return self.load.beside if self.by_host else self.load.moved


class Away(NamedTuple):
    """Everything of a job that rests off the device. Bytes per device."""

    gone: dict[str, int]  # role -> bytes that the device does not have
    trips: list[Trip]  # bucket by bucket
    uses: Uses  # parameters that come at their uses
    fetched: int  # the others, which come when a step begins, from host memory or files
    brought: tuple[int, ...]  # of those what comes from files, trip by trip
    largest_param: int  # of those, one leaf, or trip
    grads: int  # on the device, handed from program to program
    activations: int  # of a microbatch, in host memory
    kept_activations: int  # of them on the device: two layers', one on its way and one in use

    @property
    def host_moved(self) -> int:
        """What of the buckets rests in host memory: where the device updates it moves each way in a step."""
        return sum(trip.host for trip in self.trips)

    @property
    def disk_moved(self) -> int:
        """What buckets write to files."""
        return sum(trip.disk for trip in self.trips)

    @property
    def disk_read(self) -> int:
        """What buckets read of them."""
        return sum(trip.read for trip in self.trips)

    @property
    def still_here(self) -> int:
        """Parameters that stay on the device from the gradient to their update."""
        return sum(trip.here for trip in self.trips)

    @property
    def sent(self) -> int:
        """Of the update each step over the link, to the host where that updates; `back` the other way."""
        return sum(trip.sent for trip in self.trips)

    @property
    def back(self) -> int:
        return sum(trip.back for trip in self.trips)

    @property
    def pool(self) -> int:
        """Of the NVMe tier: lanes as large as the largest piece."""
        pieces = [*self.brought, *(trip.disk // trip.num for trip in self.trips if trip.disk)]
        rounds = len(self.brought) + sum(trip.num for trip in self.trips if trip.disk)
        return min(NUM_LANES, rounds) * max(pieces, default=0)

    @property
    def staged(self) -> int:
        """New leaves in host memory while the old ones of their bucket are there; of files for the host, two buckets."""
        new = max((trip.host for trip in self.trips if not trip.in_program and not trip.by_host), default=0)
        return new + 2 * max((trip.disk // trip.num for trip in self.trips if trip.by_host), default=0)

    @property
    def host_bytes(self) -> int:
        return self.host_moved + self.staged + self.pool + self.activations + self.uses.copies * self.uses.grads

    @property
    def disk_bytes(self) -> int:
        """Two generations."""
        return 2 * self.disk_moved

    @property
    def pair(self) -> int:
        """Two buckets that are on the device together, and what the update of the first works with; the largest such."""
        held = [trip.held for trip in self.trips]
        return max((sum(held[at : at + 2]) + trip.worked for at, trip in enumerate(self.trips)), default=0)

    @property
    def first_pair(self) -> int:
        """The two that arrive beside the gradient."""
        return sum(trip.held for trip in self.trips[:2])
