"""Parameters that rest in files, brought to the device before a step's first program: no program can take a file.

Where the step computes in another dtype than parameters rest in, only the working copy stays on the device: an update reads the
master again with its moments, which costs the drive as many bytes as it saves on the device while the gradient is computed.
Where the dtype is the same what was brought is the only copy, and the update takes it from where it is (`Update.held`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jzero import audit
from jzero.engine import by_slices, compiler
from jzero.engine.layout import Layout, Options
from jzero.offload.asked import Place
from jzero.offload.nvme.array import DiskArray
from jzero.offload.places import bytes_on_one_device
from jzero.offload.tier import Trip


class Piece(NamedTuple):
    """A leaf by its number, or some rows of dim 0 of it."""

    index: int
    number: int = 0
    num_parts: int = 1

    def of(self, leaf: Any) -> Any:
        return leaf.part(self.number, self.num_parts) if self.num_parts > 1 and isinstance(leaf, DiskArray) else leaf


class Bringing:
    """How one layout's parameters come from files: in trips of at most `bucket_bytes` per device, if leaves can be cut so."""

    def __init__(self, layout: Layout, options: Options, dtype: Any, bucket_bytes: int):
        self.at_rest, self.layout, self.options = layout, layout.brought(dtype), options
        self.groups = _packed(layout, bucket_bytes)
        self._programs: dict[Any, Any] = {}

    def trips(self, leaves: Sequence[Any]) -> list[Trip]:
        """Of a state's leaves."""
        return [Trip([piece.of(leaves[piece.index]) for piece in group]) for group in self.groups]

    def by_place(self, trips: Sequence[Trip]) -> dict[Place, Sequence[Trip]]:
        """As a stream is told of them: all parameters rest at one place."""
        places = {place for index in self.at_rest.in_files if (place := self.at_rest.places[index])}
        return dict.fromkeys(places, trips)

    def alone(self, state: Any, number: int) -> Any:
        """A state with its parameters brought, for a program that changes nothing. `number`: updates made so far."""
        leaves, treedef = jax.tree.flatten(state)
        trips = self.trips(leaves)
        try:
            for place, of_place in self.by_place(trips).items():
                self.options.tiers[place].begin(number, of_place)
            brought = self.bring(trips)
        finally:
            for place in self.by_place(trips):
                self.options.tiers[place].cancel()
        return jax.tree.unflatten(treedef, (dict(enumerate(leaves)) | brought).values())

    def give_up(self, state: Any) -> None:
        """The parameters that `alone` brought."""
        leaves = jax.tree.leaves(state)
        for index in self.at_rest.in_files:
            leaves[index].delete()

    def bring(self, trips: Sequence[Trip]) -> dict[int, jax.Array]:
        """The parameters by their numbers, as programs take them. The tier has been told of the trips."""
        found: dict[int, jax.Array] = {}
        for group, trip in zip(self.groups, trips, strict=True):
            place = self.at_rest.places[group[0].index]
            assert place is not None
            arrays = self.options.tiers[place].fetch(trip, [self.at_rest.on_device[piece.index] for piece in group]).result()
            for piece, array in zip(group, arrays, strict=True):
                found[piece.index] = self._taken(piece, array, found.get(piece.index))
        return found

    def _taken(self, piece: Piece, array: jax.Array, whole: jax.Array | None) -> jax.Array:
        """What has come, in the dtype that programs take; rows are put where they belong."""
        aval, sharding = self.layout.avals[piece.index], self.layout.on_device[piece.index]
        if piece.num_parts == 1 and array.dtype == aval.dtype:
            return array
        kept = {"out_shardings": sharding, "compiler_options": compiler.options(self.options.mesh)}
        if piece.num_parts == 1:
            cast = self._program(("cast", sharding, aval.dtype), lambda array: array.astype(aval.dtype), **kept)
            found = cast(array)
        else:
            if whole is None:
                key = ("empty", sharding, aval.shape, aval.dtype)
                whole = self._program(key, lambda: jnp.zeros(aval.shape, aval.dtype), **kept)()
            found = self._program(("put", sharding), _put, donate_argnums=0, **kept)(whole, array, np.int32(piece.number))
        array.delete()
        return found

    def _program(self, key: Any, function: Any, **options: Any) -> Any:
        if key not in self._programs:
            self._programs[key] = jax.jit(function, **options)
        return self._programs[key]

    @property
    def num_programs(self) -> int:
        """That it runs: one for each shape that is cast or cut."""
        kinds = set()
        for piece in (piece for group in self.groups for piece in group):
            aval, sharding = self.at_rest.avals[piece.index], self.layout.on_device[piece.index]
            if piece.num_parts > 1:
                kinds |= {("empty", sharding, aval), ("put", sharding, aval, piece.num_parts)}
            elif aval.dtype != self.layout.avals[piece.index].dtype:
                kinds.add(("cast", sharding, aval))
        return len(kinds)

    @property
    def read_bytes(self) -> int:
        """Per device."""
        return sum(
            audit.shard_bytes(self.at_rest.avals[index], self.at_rest.on_device[index]) for index in self.at_rest.in_files
        )

    @property
    def brought_bytes(self) -> int:
        """On the device while the gradient is computed."""
        return sum(audit.shard_bytes(self.layout.avals[index], self.layout.on_device[index]) for index in self.at_rest.in_files)


def _put(whole: jax.Array, rows: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, rows.astype(whole.dtype), number * rows.shape[0], 0)


def _packed(layout: Layout, bucket_bytes: int) -> list[list[Piece]]:
    """In the order of the leaves, as many to a trip as fit; large leaves by rows where their files have such."""
    groups: list[list[Piece]] = []
    room = 0
    for index in layout.in_files:
        size = bytes_on_one_device(layout.placements[index].leaf, layout.on_device[index])
        num = 1
        if size > bucket_bytes:
            cut = by_slices.rows([layout.avals[index]], layout.on_device[index], -(-size // bucket_bytes))
            num = cut.num if cut else 1
        for number in range(num):
            if size // num > room:
                groups.append([])
                room = bucket_bytes
            groups[-1].append(Piece(index, number, num))
            room -= size // num
    return groups
