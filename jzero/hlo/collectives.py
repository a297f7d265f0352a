"""The collectives of a module, each once, with the number of times that a step executes it.

The back ends spell one collective in many ways: in place, as start and done, inside an `async-start`, as a tuple of several
arrays, as a chain of fused pieces (TPU), as an all-reduce whose result is sliced (CPU). Here it is one thing.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jzero.hlo.groups import Groups, decode, decode_pairs, group_size
from jzero.hlo.loops import trip_count
from jzero.hlo.meaning import Kind, beside_windowed, is_sliced, scatter_fusion, sliced_arrays, windowed
from jzero.hlo.text import Computation, Instruction, Module, Shape, attribute, bits, called

_KINDS: dict[str, Kind] = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-permute",
}


class Collective(NamedTuple):
    """One collective instruction of the program, as one device sees it."""

    kind: Kind
    groups: Groups  # partition ids, in the order of `mesh.devices.flat`; (source, target) pairs for a permute
    dtype: str  # on the wire; several joined by "+" where one instruction combines arrays of different dtypes
    arrays: tuple[Shape, ...]  # the full side: what a gather makes, what every other kind takes
    result_bytes: int  # of the instruction's result
    count: int | None  # executions per step, loops multiplied out; None inside a loop of unknown length
    loop_depth: int
    op_name: str
    source: str  # "file:line" of the user code, or ""
    channel_id: int | None
    meaning: Kind  # `kind`, but for an all-reduce of which each device keeps a piece, and a collective done by permutes
    chain: str = ""  # the same for all pieces of a collective that the compiler spread over several fusions

    @property
    def elements(self) -> int:
        """Elements of the full side per device, per execution."""
        return sum(array.elements for array in self.arrays)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full side per device, per execution."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sliced(self) -> bool:
        """An all-reduce whose readers all take one piece of it: a reduce-scatter in meaning."""
        return self.kind == "all-reduce" and self.meaning == "reduce-scatter"

    @property
    def num_ops(self) -> int:
        """Arrays that travel together in the one instruction."""
        return len(self.arrays)


class _Place(NamedTuple):
    """Where the walk is: a computation, how often it runs, and how deep in loops."""

    module: Module
    home: Computation
    num_devices: int
    count: int | None
    loop_depth: int
    windowed: str = ""  # inside a loop that does a matrix product and its collective together: the body's name
    piece_of: str = ""  # inside a fusion that carries a piece of a collective
    scatters: bool = False  # inside an `all-reduce-scatter` fusion

    def inside(self, name: str, **changes: Any) -> "_Place":
        return self._replace(home=self.module.computations[name], **changes)


def collectives(module: Module, num_devices: int) -> tuple[Collective, ...]:
    """Every collective that one step executes, in program order, one entry per instruction.

    Loop bodies are counted `trip count` times: printed by the CPU and GPU compilers, worked out from the loop's condition
    for the TPU's. Of a conditional's branches the one that moves the most counts, per kind and group. Pieces of one
    collective count once: start and done, and the chain of fusions that a TPU gather is spread over.

    Args:
      module: from `parse`.
      num_devices: partitions of the program (`mesh.size`), for collectives that name no groups.

    Returns:
      The collectives. `count` is None in a loop whose length is not known.
    """
    return tuple(_walk(_Place(module, module.computations[module.entry], num_devices, 1, 0)))


def _walk(place: _Place) -> list[Collective]:
    """The collectives of one computation and of what it calls."""
    found = [one for instruction in place.home.instructions.values() for one in _of(instruction, place)]
    return found if place.piece_of else _once(found)


def _of(instruction: Instruction, place: _Place) -> Iterable[Collective]:
    if instruction.opcode.removesuffix("-start") in _KINDS:
        return _apart(_collective(instruction, place), instruction, place)
    follow = _FOLLOW.get(instruction.opcode)
    return follow(instruction, place) if follow else []


def _in_loop(loop: Instruction, place: _Place) -> list[Collective]:
    trips = trip_count(loop, place.home, place.module)
    count = None if trips is None or place.count is None else trips * place.count
    body, *others = called(loop, "body", "condition")
    inside = {"count": count, "loop_depth": place.loop_depth + 1, "windowed": body if windowed(body) else place.windowed}
    return [one for name in (body, *others) for one in _walk(place.inside(name, **inside))]


def _in_branches(conditional: Instruction, place: _Place) -> list[Collective]:
    names = called(conditional, "branch_computations", "true_computation", "false_computation")
    branches = [_walk(place.inside(name)) for name in names]
    keys = dict.fromkeys((one.kind, one.groups) for branch in branches for one in branch)
    return [one for key in keys for one in max((_only(key, branch) for branch in branches), key=_moved)]


def _in_fusion(fusion: Instruction, place: _Place) -> list[Collective]:
    name = called(fusion, "calls")[0]
    return _walk(place.inside(name, piece_of=name, scatters=scatter_fusion(fusion)))


def _in_call(call: Instruction, place: _Place) -> list[Collective]:
    return [one for name in called(call, "calls", "to_apply", "called_computations") for one in _walk(place.inside(name))]


_FOLLOW: dict[str, Callable[[Instruction, _Place], list[Collective]]] = {
    "while": _in_loop,
    "conditional": _in_branches,
    "fusion": _in_fusion,
    "call": _in_call,
    "custom-call": _in_call,
    "async-start": _in_call,
}


def _collective(instruction: Instruction, place: _Place) -> Collective:
    kind = "reduce-scatter" if place.scatters else _KINDS[instruction.opcode.removesuffix("-start")]
    channel = attribute(instruction, "channel_id")
    groups = _groups(instruction, place.num_devices)
    result = _result(instruction, place.home)
    arrays = result if kind == "all-gather" else _taken(kind, _operands(instruction, place.home), result)
    return Collective(
        kind=kind,
        groups=groups,
        dtype="+".join(dict.fromkeys(array.dtype for array in arrays)),
        arrays=arrays,
        result_bytes=sum(array.bytes for array in result),
        count=place.count,
        loop_depth=place.loop_depth,
        op_name=instruction.op_name,
        source=place.module.source(instruction),
        channel_id=int(channel) if channel else None,
        meaning=_meaning(kind, instruction, group_size(groups), place),
        chain=_chain(instruction, place),
    )


def _apart(whole: Collective, instruction: Instruction, place: _Place) -> list[Collective]:
    """An all-reduce of several arrays as two: for those of which each device keeps a piece, and for the others."""
    if whole.kind != "all-reduce" or whole.meaning != whole.kind:
        return [whole]
    flags = sliced_arrays(instruction, place.home, place.module, group_size(whole.groups))
    if not any(flags) or len(flags) != len(whole.arrays):
        return [whole]
    halves = []
    for flag, meaning in ((True, "reduce-scatter"), (False, "all-reduce")):
        arrays = tuple(array for array, sliced in zip(whole.arrays, flags, strict=True) if sliced == flag)
        size = sum(array.bytes for array in arrays)
        dtype = "+".join(dict.fromkeys(array.dtype for array in arrays))
        halves += [whole._replace(arrays=arrays, dtype=dtype, result_bytes=size, meaning=meaning)] if arrays else []
    return halves


def _meaning(kind: Kind, instruction: Instruction, num_members: int, place: _Place) -> Kind:
    if kind == "all-reduce" and is_sliced(instruction, place.home, place.module, num_members):
        return "reduce-scatter"
    if kind == "all-reduce" and instruction.op_name.endswith("all_gather"):  # the TPU compiler's way with tiny gathers
        return "all-gather"
    if kind == "collective-permute":
        return windowed(place.windowed) or beside_windowed(instruction, place.home) or kind
    return kind


def _groups(instruction: Instruction, num_devices: int) -> Groups:
    if pairs := attribute(instruction, "source_target_pairs"):
        return decode_pairs(pairs)
    text = attribute(instruction, "replica_groups") or "{}"
    # With a channel and without global ids a group names replicas, and all partitions of them take part.
    local_ids = attribute(instruction, "channel_id") and not attribute(instruction, "use_global_device_ids")
    everyone = local_ids and instruction.opcode.startswith(("all-reduce", "all-gather", "reduce-scatter"))
    return decode("{}" if everyone else text, num_devices)


def _result(instruction: Instruction, home: Computation) -> tuple[Shape, ...]:
    """The arrays that the collective makes; a start's are those of its done, or the second part of its own type."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shape.arrays
    for other in home.instructions.values():
        if other.opcode.endswith("-done") and other.operands[0] == instruction.name:
            return other.shape.arrays
    return (instruction.shape.parts[1] if len(instruction.shape.parts) > 1 else instruction.shape).arrays


def _operands(instruction: Instruction, home: Computation) -> tuple[Shape, ...]:
    shapes = (home.instructions[name].shape for name in instruction.operands if name in home.instructions)
    return tuple(array for shape in shapes for array in shape.arrays)


def _taken(kind: str, operands: tuple[Shape, ...], result: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The full side of what is sent. A TPU adds in the result's dtype what it is given in a narrower one: sums travel in it."""
    if kind not in ("all-reduce", "reduce-scatter") or len(operands) != len(result):
        return operands or result
    widest = lambda given, made: made.dtype if bits(made.dtype) > bits(given.dtype) else given.dtype
    return tuple(given._replace(dtype=widest(given, made)) for given, made in zip(operands, result, strict=True))


def _chain(instruction: Instruction, place: _Place) -> str:
    """What the pieces of one collective have in common. A channel does not do: shard_map gives all of its own number 1."""
    if not place.piece_of:
        return ""
    chain = attribute(instruction, "frontend_attributes") or ""
    key = chain if "chain_id" in chain else instruction.op_name if "async_collective" in place.piece_of else ""
    return f"{key} {attribute(instruction, 'channel_id')}" if key else ""


def _once(found: list[Collective]) -> list[Collective]:
    """The first piece of each chain, and everything that is no piece."""
    seen: set[tuple[object, ...]] = set()
    keys = [(one.kind, one.chain, one.arrays) for one in found]
    return [one for one, key in zip(found, keys, strict=True) if not one.chain or (key not in seen and not seen.add(key))]


def _only(key: tuple[Kind, Groups], found: list[Collective]) -> list[Collective]:
    return [one for one in found if (one.kind, one.groups) == key]


def _moved(branch: list[Collective]) -> int:
    return sum(one.full_bytes * (one.count or 1) for one in branch)
