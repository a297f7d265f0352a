"""How long what rests off the device takes to come and go, and how much of it passes while the device computes.

- Parameters at rest in host memory or files are fetched whole when a step begins; every layer waits for them. From files they
  come through drive and link at once, at the rate of the slower.
- What comes at its use does so in every microbatch, for the forward and again for the backward pass, and its gradient leaves
  as it appears; with several microbatches the sum so far comes to meet it. Both directions at once, beside the compute.
- Activations leave in the forward pass and come back in the backward pass, beside the layers.
- Whole buckets of the update: while one leaves the next arrives, so only one direction is waited for; the first two arrive
  beside the gradient. Slices inside a program fetch and put back in turns: both directions are waited for.
- What the host updates: gradients go and parameters that rest on the device go and come back, in turns; then the host's memory
  is read and written, while nothing else goes on.
- Files are read and written at once, through a pool: a drive's rate is that of both together. The pool is filled beside the
  gradient; the rest of the drive's time is waited for, unless the link's is longer.
"""

from typing import Any, NamedTuple

from jzero.plan.away import Away
from jzero.plan.hosts import Room


class Transfer(NamedTuple):
    """Seconds per step of one device's transfers."""

    fetch_s: float = 0.0  # parameters, at the start, from host memory
    activations_s: float = 0.0  # both ways
    link_s: float = 0.0  # of the update: host link, as the engine overlaps its directions
    disk_s: float = 0.0  # of the update: the drive's reads and writes, what is read beside the gradient left out
    host_s: float = 0.0  # of the update: the host's processors, where they compute it
    alone_s: float = 0.0  # all of it, one after the other
    waited_s: float = 0.0  # what the step takes longer for it
    read_s: float = 0.0  # parameters, at the start, from files
    uses_s: float = 0.0  # parameters at their uses and their gradients, the longer way

    @property
    def hidden(self) -> float:
        """The share of transfer time that costs nothing."""
        return 1 - self.waited_s / self.alone_s if self.alone_s else 1.0

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"hidden": self.hidden}


def transfer(away: Away, room: Room, *, compute_s: float, num_micro: int) -> Transfer:
    """`compute_s`: how long the gradient takes; `num_micro`: microbatches in it."""
    from_files = sum(away.brought)
    fetch = (away.fetched - from_files) / room.link
    read = from_files / min(room.link, room.disk_bandwidth) if from_files else 0.0
    activations = 2 * away.activations * num_micro / room.link
    uses = max(away.uses.comes, away.uses.left) / room.link
    of_device, of_host = ([trip for trip in away.trips if trip.by_host == yes] for yes in (False, True))
    in_turns = sum(trip.host for trip in of_device if trip.in_program)
    streamed = sum(trip.sent for trip in of_device) - in_turns
    travels = sum(trip.sent + trip.back for trip in of_host) / room.link
    link = (streamed + 2 * in_turns) / room.link + travels
    host = sum(trip.load.seconds_on_host(room.link, room.host_bandwidth) for trip in of_host) - travels
    both = (away.disk_read + away.disk_moved) / room.disk_bandwidth if away.disk_moved else 0.0
    early = min(away.pool, away.disk_read) / room.disk_bandwidth if away.disk_moved else 0.0
    disk = both - min(early, compute_s)
    over_link = away.fetched + away.uses.comes + away.uses.left + away.sent + away.back - away.still_here
    from_drive = from_files / room.disk_bandwidth if from_files else 0.0
    alone = over_link / room.link + activations + host + both + from_drive
    waited = fetch + read + max(0.0, activations + uses - compute_s) + max(link + host, disk)
    return Transfer(fetch, activations, link, disk, host, alone, waited, read, uses)
