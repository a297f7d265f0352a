"""Buckets come, are computed and leave: while one is computed the next arrives and the last leaves; never more than two."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jzero.offload.asked import Place
from jzero.offload.tier import Moving, Tier, Trip


class Leaves(NamedTuple):
    """The leaves of one bucket in a fixed order, some of which rest at a place."""

    at_rest: list[Any]
    shardings: Sequence[Any]  # where they are to arrive
    places: Sequence[Place | None]
    here: Sequence[bool] = ()  # that are on the device already, and only leave


class Journey:
    """The leaves of one bucket on their way, by one or several tiers."""

    def __init__(self, leaves: Leaves, tiers: Mapping[Place, Tier]):
        self.leaves, self.tiers = leaves, tiers
        self.members = {
            place: [index for index, where in enumerate(leaves.places) if where == place]
            for place in dict.fromkeys(where for where in leaves.places if where is not None)
        }
        here = leaves.here or [False] * len(leaves.places)
        self.coming = {place: [index for index in members if not here[index]] for place, members in self.members.items()}
        at_rest = lambda members: [leaves.at_rest[index] for index in members]
        self.trips = {place: Trip(at_rest(self.coming[place]), at_rest(self.members[place])) for place in self.members}

    def arrive(self) -> "Arriving":
        shardings = self.leaves.shardings
        moving = {
            place: self.tiers[place].fetch(self.trips[place], [shardings[index] for index in coming])
            for place, coming in self.coming.items()
        }
        return Arriving(self, moving)

    def leave(self, arrays: Sequence[jax.Array]) -> "Leaving":
        """Starts to put the new arrays where the old leaves rest; those that rest on the device stay."""
        moving = {
            place: self.tiers[place].put_back(self.trips[place], [arrays[index] for index in members])
            for place, members in self.members.items()
        }
        return Leaving(self, list(arrays), moving)

    def give_up(self) -> None:
        """The old leaves: arrays let go of their memory. What a tier made itself is its own affair."""
        for leaf, place in zip(self.leaves.at_rest, self.leaves.places, strict=True):
            if place is not None and isinstance(leaf, jax.Array):
                leaf.delete()

    @staticmethod
    def merged(values: list[Any], moving: dict[Place, Moving], members: Mapping[Place, list[int]]) -> list[Any]:
        found = list(values)
        for place, one in moving.items():
            for index, value in zip(members[place], one.result(), strict=True):
                found[index] = value
        return found


class Arriving(NamedTuple):
    journey: Journey
    moving: dict[Place, Moving]

    def result(self) -> list[jax.Array]:
        """All leaves of the bucket; those that were here already as they rest, for whoever has them."""
        return self.journey.merged(self.journey.leaves.at_rest, self.moving, self.journey.coming)

    def drop(self) -> None:
        """Nobody needs them."""
        for one in self.moving.values():
            for array in one.result():
                array.delete()


class Leaving(NamedTuple):
    journey: Journey
    arrays: list[Any]
    moving: dict[Place, Moving]

    def result(self) -> list[Any]:
        return self.journey.merged(self.arrays, self.moving, self.journey.members)


class Stream:
    """One step's walk over the buckets. The first two buckets travel between `start` and `run`."""

    AHEAD = 2

    def __init__(self, buckets: Iterable[Leaves], tiers: Mapping[Place, Tier], *, gives_up: bool):
        """`gives_up`: old leaves are deleted as soon as new ones have taken their place."""
        self.journeys = [Journey(leaves, tiers) for leaves in buckets]
        self.tiers, self.gives_up, self.arriving = tiers, gives_up, []

    def begin(self, step: int, first: Mapping[Place, Sequence[Trip]] | None = None) -> None:
        """Say what will travel. `step`: updates made so far; `first`: what is brought before the buckets."""
        trips = {
            place: [*(first or {}).get(place, ()), *(one.trips[place] for one in self.journeys if place in one.trips)]
            for place in self.tiers
        }
        self.tiers = {place: tier for place, tier in self.tiers.items() if trips[place]}  # `fraction` may leave a place empty
        for place, tier in self.tiers.items():
            tier.begin(step, trips[place])

    def start(self) -> None:
        """Send the first two on their way."""
        self.arriving = [journey.arrive() for journey in self.journeys[: self.AHEAD]]

    def cancel(self) -> None:
        """The step is skipped: nothing moves back."""
        for arriving in self.arriving:
            arriving.drop()
        self.stop()

    def stop(self) -> None:
        """The step ends here, skipped or failed."""
        for tier in self.tiers.values():
            tier.cancel()

    def run(self, update: Callable[[int, list[jax.Array]], list[jax.Array]]) -> list[list[Any]]:
        """`update(number, arrays)` for every bucket; the new leaves at rest, bucket by bucket."""
        try:
            return self._run(update)
        except BaseException:
            self.stop()
            raise

    def _run(self, update: Callable[[int, list[jax.Array]], list[jax.Array]]) -> list[list[Any]]:
        left = []
        for number, journey in enumerate(self.journeys):
            leaving = journey.leave(update(number, self.arriving[number].result()))
            self.arriving[number] = None
            left.append(leaving.result())
            if self.gives_up:
                journey.give_up()
            if number + self.AHEAD < len(self.journeys):
                self.arriving.append(self.journeys[number + self.AHEAD].arrive())
        self._end()
        return left

    def _end(self) -> None:
        """All places or none: what may fail for want of room comes before the first of them counts its new leaves."""
        for tier in self.tiers.values():
            tier.settle()
        ended: list[Tier] = []
        try:
            for tier in self.tiers.values():
                tier.end()
                ended.append(tier)
        except BaseException:
            for tier in ended:
                tier.undo()
            raise
