"""What rests off the device, how it comes and goes, and what of it is on the device meanwhile: the engine's rules, from shapes.

The gradient program gives out gradients in the accumulation dtype, so they are whole beside its temporaries. Then buckets of
parameters and moments are updated one after the other, two on the device at a time (`jzero/offload/stream.py`); a leaf larger
than a bucket goes by slices, if the engine can slice it there (`jzero/offload/slices.py`, `jzero/engine/by_slices.py`). What
the host updates stays there, and gradients go (`jzero/engine/computing.py`). Parameters in files are brought before the
gradient; cast to the dtype of the computation, or else as they are, and then the update need not read them again
(`jzero/engine/bringing.py`). Parameters that come at their uses have their gradients in host memory (`at_use.py`).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero import precision as precisions
from jzero import stages
from jzero.engine import by_slices
from jzero.engine import resting as engine_resting
from jzero.engine.computing import Load
from jzero.offload import buckets as packing
from jzero.offload import slices
from jzero.offload.asked import AUTO, DEVICE, HOST, NVME
from jzero.offload.buckets import Bucket
from jzero.offload.places import staying
from jzero.plan import at_use, facts, hosts, pipelines
from jzero.plan import moments as moment
from jzero.plan.at_use import Uses
from jzero.plan.away import Away, Trip
from jzero.plan.job import Job
from jzero.plan.moments import Moment
from jzero.plan.shapes import Leaf, Split

_ROLES = ("params", "opt_state", "opt_state")  # a parameter and Adam's two moments


def resting(job: Job) -> dict[str, list[int]]:
    """Role -> bytes per device of every array, leaf by leaf, wherever it rests."""
    size, stage, found = moment.sizes(job), stages.get(job.stage), pipelines.held(job)
    params = [size.param * count for count in moment.counted(found, job.zero if stage.shard_params else None)]
    moments_of = [size.moment * count for count in moment.counted(found, job.zero if stage.shard_opt_state else None)]
    return {"params": params, "opt_state": [*moments_of, *moments_of]}


def away(job: Job) -> Away | None:
    """What of a job is off the device; None if nothing is."""
    if job.offload is None:
        return None
    size, stage, found = moment.sizes(job), stages.get(job.stage), pipelines.held(job)
    every = resting(job)
    table = [every["params"], every["opt_state"][: len(found)], every["opt_state"][len(found) :]]
    going = {
        row * len(found) + index: table[row][index]
        for row, role in enumerate(_ROLES)
        for index in range(len(found))
        if job.offload.place_of(role)
    }
    for number in staying(going, job.offload.fraction):
        del going[number]
    gone = {"params": 0, "opt_state": 0}
    for number, amount in going.items():
        gone[_ROLES[number // len(found)]] += amount
    grads = [size.accumulate * count for count in moment.counted(found, job.zero if stage.shard_params else None)]
    uses = at_use.uses(job, found, going, grads)
    fetched = [amount for number, amount in going.items() if number < len(found) and number not in uses.leaves]
    saved, kept = _activations(job, size)
    trips = _trips(job, found, going, uses) if going else []
    brought = _brought(job, found, going) if _on_disk(job, "params") else []
    largest = max(brought or fetched, default=0)
    handed = sum(grads) - uses.grads if going else 0
    return Away(gone, trips, uses, sum(fetched), tuple(brought), largest, handed, saved, kept)


def _on_disk(job: Job, role: str) -> bool:
    place = job.offload.place_of(role) if job.offload is not None else None
    return place is not None and place.kind == NVME


def _order(found: tuple[Leaf, ...]) -> list[int]:
    """The engine's order of parameters: that of their paths, in which a bias comes before its kernel."""

    def path(name: str) -> str:
        module, _, part = name.rpartition("_")
        return f"{module}/{part}" if part in ("bias", "scale") else f"{name}/kernel"

    return sorted(range(len(found)), key=lambda index: (not found[index].is_layer, path(found[index].name)))


def _wanted(job: Job, found: tuple[Leaf, ...], going: dict[int, int]) -> int:
    """The size of a bucket."""
    assert job.offload is not None
    rows = [row for row, role in enumerate(_ROLES) if _on_disk(job, role)]
    in_files = sum(going.get(row * len(found) + index, 0) for row in rows for index in range(len(found)))
    return job.offload.bucket_bytes or engine_resting.in_reach(packing.DEFAULT_BYTES, in_files)


def _brought(job: Job, found: tuple[Leaf, ...], going: dict[int, int]) -> list[int]:
    """The engine's trips of parameters before the gradient: as many to one as fit a bucket, large ones by rows."""
    wanted, trips, room = _wanted(job, found, going), [], 0
    for index in (index for index in _order(found) if index in going):
        size, num = going[index], 1
        if size > wanted:
            cut = by_slices.rows(
                [_array(found[index], moment.sizes(job).param)], _placed(job, found[index]), -(-size // wanted)
            )
            num = cut.num if cut else 1
        for _ in range(num):
            if size // num > room:
                trips.append(0)
                room = wanted
            trips[-1] += size // num
            room -= size // num
    return trips


def _activations(job: Job, size: moment.Sizes) -> tuple[int, int]:
    """What "dots" saves beyond each layer's input, in host memory; and two layers' of it on the device."""
    if job.offload is None or job.offload.activations is None:
        return 0, 0
    each = job.micro_tokens * (moment.saved(job, size) - moment.saved(job._replace(remat="full"), size))
    return each * job.config.num_layers, 2 * each


def _trips(job: Job, found: tuple[Leaf, ...], going: dict[int, int], uses: Uses) -> list[Trip]:
    """The engine's buckets, in its order."""
    order, wanted, size = _order(found), _wanted(job, found, going), moment.sizes(job)
    parts = {index: [going.get(row * len(found) + index, 0) for row in range(3)] for index in order}
    rows = [row for row, role in enumerate(_ROLES) if _on_disk(job, role)]
    is_held = _on_disk(job, "params") and size.param == size.compute
    loads, by_host = _loads(job, found, parts, uses.leaves), update_of(job) == HOST
    early = _loads(job, found, parts, at_use.candidates(job, found, going))
    every = [Bucket((index,), (index,), loads[index].moved) for index in order]
    groups = [one._replace(on_host=True, moved_bytes=early[one.params[0]].held) if by_host and one.moved_bytes else one
              for one in every]  # fmt: skip
    trips = []
    for bucket in packing.pack(groups, wanted):
        of_disk = sum(parts[index][row] for index in bucket.params for row in rows)
        here = sum(parts[index][0] for index in bucket.params) if is_held else 0
        members = [loads[index] for index in bucket.params]
        moved, beside, grads = (sum(one[at] for one in members) for at in range(3))
        load = Load(moved, beside, grads, grads_there=sum(one.grads_there for one in members))
        num, in_program = 1, False
        if bucket.moved_bytes > wanted:
            num, in_program = _pieces(job, found[bucket.params[0]], parts[bucket.params[0]], bucket.moved_bytes, wanted)
        trips.append(Trip(load.moved - of_disk, of_disk, load, num, in_program, here, bucket.on_host))
    return trips


def _loads(
    job: Job, found: tuple[Leaf, ...], parts: dict[int, list[int]], leaving: frozenset[int]
) -> dict[int, Load]:  # fmt: skip
    """Leaf by leaf what rests off the device, what beside it on the device, and its gradient, which may be `leaving`."""
    every, size, stage = resting(job), moment.sizes(job), stages.get(job.stage)
    grads = [size.accumulate * count for count in moment.counted(found, job.zero if stage.shard_params else None)]
    whole = {index: every["params"][index] + 2 * every["opt_state"][index] for index in parts}
    moved = {index: sum(amounts) for index, amounts in parts.items()}
    there = {index: grads[index] if index in leaving else 0 for index in parts}
    return {index: Load(moved[index], whole[index] - moved[index], grads[index], grads_there=there[index]) for index in parts}


def update_of(job: Job) -> str:
    """Where the update is computed. `"auto"`: where link and host memory (`hosts`) say that all of it takes less time; the
    engine decides by what it measures, and on devices that are not there for the device.
    """
    assert job.offload is not None
    if job.offload.update != AUTO:
        return job.offload.update
    both = {name: job._replace(offload=replace(job.offload, update=name)) for name in (DEVICE, HOST)}
    seconds = {name: _update_s(one) for name, one in both.items()}
    return min(seconds, key=lambda name: seconds[name])


def _update_s(job: Job) -> float:
    found, room = away(job), hosts.room_of(job)
    assert found is not None
    return sum(
        trip.load.seconds_on_host(room.link, room.host_bandwidth)
        if trip.by_host
        else trip.load._replace(in_turns=trip.in_program).seconds_on_device(room.link)
        for trip in found.trips
    )


class _Placed(NamedTuple):
    """What slicing reads of a sharding."""

    spec: tuple[str | None, ...]
    split: Split

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = list(shape)
        for dim, num in ((self.split.dim, self.split.num), (self.split.sequence_dim, self.split.over_sequence)):
            if dim is not None:
                found[dim] //= num
        return tuple(found)


def _array(leaf: Leaf, num_bytes: int) -> Any:
    """A leaf as it lies in files, of as many bytes an element."""
    shape = (leaf.repeats, *leaf.shape) if leaf.is_layer else leaf.shape
    return jax.ShapeDtypeStruct(shape, jnp.dtype(f"uint{8 * num_bytes}"))


def _placed(job: Job, leaf: Leaf) -> Any:
    """How it is sharded."""
    split = leaf.split(job.zero)
    taken = {dim for dim in (split.dim, split.sequence_dim) if dim is not None}
    taken |= {leaf.tensor_dim} if leaf.num_pieces > 1 else set()
    taken |= {leaf.expert_dim} if leaf.num_groups > 1 else set()
    spec = tuple("data" if dim in taken else None for dim in range(len(leaf.shape)))
    if leaf.is_layer:
        spec = ("pipe" if job.pipe > 1 else None, *spec)
        split = split._replace(dim=_behind(split.dim), sequence_dim=_behind(split.sequence_dim))
    return _Placed(spec, split)


def _pieces(job: Job, leaf: Leaf, parts: list[int], moved: int, wanted: int) -> tuple[int, bool]:
    """In how many pieces a leaf larger than a bucket goes, and whether inside its program."""
    placed, size = _placed(job, leaf), moment.sizes(job)
    if precisions.get(job.precision).rounds_stochastically:
        return 1, False  # its noise is a function of an element's place: no update of a slice is a slice of the update
    in_files = [bool(amount) and _on_disk(job, role) for amount, role in zip(parts, _ROLES, strict=True)]
    if not any(in_files):
        cut = slices.cut(_array(leaf, 1).shape, [placed], moved, wanted, on_tpu=facts.is_tpu(job.parsed))
        return (cut.num, True) if cut else (1, False)
    rests_here = not parts[0] and size.param == size.accumulate
    if not all(in_files[1:]) or not (in_files[0] or rests_here):  # what travels otherwise, or is not what gradients are: whole
        return 1, False
    arrays = [_array(leaf, size.param)] * in_files[0] + [_array(leaf, size.moment)] * 2
    cut = by_slices.rows(arrays, placed, -(-moved // wanted))
    return (cut.num, False) if cut else (1, False)


def _behind(dim: int | None) -> int | None:
    return None if dim is None else dim + 1


def moments(job: Job, away: Away, found: dict[str, Moment]) -> dict[str, Moment]:
    """The moments of a step with offload, from those without: sums leave the gradient program as gradients, two buckets are
    there beside it, and the update has them and no more.
    """
    during = {name: {**one} for name, one in found.items() if name != "update"}
    for one in during.values():
        if away.activations:
            one["saved activations"] -= away.activations - away.kept_activations
    if not away.trips:
        return {**found, **during}
    size, handed = moment.sizes(job), {"gradients handed over": away.grads, "buckets": away.first_pair}
    for name, one in during.items():
        if job.accumulate == 1 and job.pipe == 1 and name != "head":  # what leaves the program is empty before it ends, and
            room = away.grads  # temporaries lie there
            for part in (part for part in ("gradients", "attention scores") if part in one):
                one[part], room = max(0, one[part] - room), max(0, room - one[part])
        if away.fetched and size.compute == size.param:  # nothing is cast: what was fetched is what the step works with
            one["working copy"] += away.fetched
        one["sum of gradients"] = max(0, one["sum of gradients"] - away.grads)
        one.update(handed)
    update = {"gradients handed over": away.grads, "buckets": away.pair}
    every = during | {"update": update | ({"working copy": away.still_here} if away.still_here else {})}
    if away.brought:  # nothing else is there yet; one trip is cast while the next comes
        every["fetch"] = {"working copy": during["head"]["working copy"], "largest trips": 2 * away.largest_param}
    elif away.fetched:
        every["fetch"] = {"working copy": during["head"]["working copy"], "largest leaf": away.largest_param, **handed}
    return every


def is_blind(job: Job) -> bool:
    """Whether the job's compiler cannot show what it does in host memory: that of GPUs, without one, knows no such memory."""
    if facts.is_tpu(job.parsed) or (found := away(job)) is None:
        return False
    return found.activations > 0 or bool(found.uses.leaves) or any(trip.by_host for trip in found.trips)


def places_of(job: Job) -> tuple[str, ...]:
    """`"host"`, `"nvme"`: what a job uses beside the device."""
    if job.offload is None:
        return ()
    kinds = {place.kind for name in ("opt_state", "params", "activations") if (place := job.offload.place_of(name))}
    return tuple(kind for kind in (HOST, NVME) if kind in kinds)
