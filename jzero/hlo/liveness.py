"""Which buffers of a scheduled program are alive at each instruction, so that its peak has names and source lines.

The compilers print a schedule, not a buffer assignment. What XLA's own analysis would find is worked out from the schedule by
its rules (openxla/xla, `hlo_alias_analysis`, `hlo_live_range`): a loop's state is one buffer from before the loop until after
it, an update in place writes into its operand, tuples and bitcasts own nothing, and an elementwise result takes the memory of
an operand that dies there. What it cannot see is how the allocator packs the buffers.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jzero.hlo.layout import HBM, stored
from jzero.hlo.text import Computation, Instruction, Module, Shape, attribute, called

ALIASES = {"bitcast", "opt-barrier", "add-dependency", "async-update", "domain"}
WITHOUT_MEMORY = {"constant", "after-all", "partition-id", "replica-id"}
IN_PLACE = {"dynamic-update-slice": 0, "scatter": 0, "set-dimension-size": 0}  # the operand that the result is written over
_PASSING = {
    *ALIASES,
    "tuple",
    "get-tuple-element",
    "while",
    "conditional",
    "call",
    "copy-start",
    "copy-done",
    "all-gather-done",
}
SAME_VALUE = {"bitcast", "copy", "convert", "reshape"}
ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "select", "tanh", "exponential", "negate", "convert",
    "rsqrt", "sqrt", "abs", "log", "power", "and", "or", "compare", "all-reduce", "all-reduce-start",
}  # fmt: skip


class Buffer(NamedTuple):
    """One piece of memory of one device, alive from instruction `start` to instruction `end` of the program in order."""

    instruction: str
    opcode: str
    shape: str  # as printed
    elements: int
    bytes: int  # as stored, with padding
    space: int  # 0 is the device's main memory
    start: int
    end: int
    kind: str  # "argument", "output" or "temp"
    op_name: str  # of what made it, or first filled it in place
    source: str
    last_read: str  # the op_name of the last named instruction that reads it
    keeps: str  # of a buffer filled slice by slice in a loop: the instruction of a collective whose results it keeps


class Liveness(NamedTuple):
    """The buffers of one program over its instructions, loops entered once."""

    buffers: tuple[Buffer, ...]
    length: int

    @property
    def temps(self) -> list[Buffer]:
        """What the program takes of the device's main memory beside its arguments and outputs."""
        return [buffer for buffer in self.buffers if buffer.kind == "temp" and buffer.space == HBM]

    def timeline(self, chosen: Callable[[Buffer], bool] = lambda _: True) -> list[int]:
        """Bytes of the chosen temporaries at each instruction."""
        changes = [0] * (self.length + 2)
        for buffer in self.temps:
            if chosen(buffer):
                changes[buffer.start] += buffer.bytes
                changes[buffer.end + 1] -= buffer.bytes
        total, line = 0, []
        for change in changes[:-1]:
            total += change
            line.append(total)
        return line

    @property
    def peak_at(self) -> int:
        """The first instruction at which most temporaries are alive."""
        line = self.timeline()
        return line.index(max(line))

    @property
    def temp_bytes(self) -> int:
        return max(self.timeline())

    def at(self, position: int) -> list[Buffer]:
        """Temporaries alive at an instruction, the largest first."""
        alive = [buffer for buffer in self.temps if buffer.start <= position <= buffer.end]
        return sorted(alive, key=lambda buffer: -buffer.bytes)


class _Piece:
    """What one array of one instruction is stored in, until it is joined with others."""

    __slots__ = ("bytes", "end", "filler", "instruction", "joined", "keeps", "kind", "last_read", "shape", "space", "start")

    def __init__(self, size: int, space: int, at: int, instruction: Instruction, shape: Shape, kind: str):
        self.bytes, self.space, self.start, self.end, self.kind = size, space, at, at, kind
        self.instruction, self.shape, self.last_read, self.keeps = instruction, shape, "", ""
        self.joined: _Piece | None = None  # stored in the same memory: that one speaks for both
        self.filler: Instruction | None = None  # what first writes into it in place, as a loop fills a stack of zeros

    def root(self) -> "_Piece":
        piece = self
        while piece.joined is not None:
            piece = piece.joined
        return piece


_Pieces = list[_Piece]


def liveness(module: Module) -> Liveness:
    """The buffers of a scheduled module.

    Args:
      module: from `parse`, of a compiled program.

    Returns:
      Buffers in device memory with their lives, in bytes per device. Their peak is what the program needs beside its arguments
      if the allocator packs without gaps.
    """
    walk = _Walk(module)
    entry = module.computations[module.entry]
    out = walk.run(entry, None)
    for piece in out:
        root = piece.root()
        root.kind = "output" if root.kind == "temp" else root.kind
    walk.share()
    roots = dict.fromkeys(piece.root() for piece in walk.pieces)
    buffers = [_buffer(piece, module) for piece in roots if piece.bytes]
    return Liveness(tuple(buffers), walk.now)


def _buffer(piece: _Piece, module: Module) -> Buffer:
    made, shape = piece.instruction, piece.shape
    named = piece.filler or made
    named = named if named.op_name else made
    text = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
    return Buffer(
        instruction=made.name,
        opcode=made.opcode,
        shape=text,
        elements=shape.elements,
        bytes=piece.bytes,
        space=piece.space,
        start=piece.start,
        end=piece.end,
        kind=piece.kind,
        op_name=named.op_name,
        source=module.source(named),
        last_read=piece.last_read,
        keeps=piece.keeps,
    )


class _Walk:
    """Goes through the program in the order of its schedule, loop bodies where their loops stand."""

    def __init__(self, module: Module):
        self.module, self.now = module, 0
        self.pieces: _Pieces = []
        self.dying: list[tuple[int, _Pieces, _Pieces]] = []  # where results may take operands' memory

    def run(self, home: Computation, arguments: _Pieces | None) -> _Pieces:
        """One computation; `arguments` None is the whole program. Returns what its root is stored in."""
        names: dict[str, _Pieces] = {}
        for instruction in home.instructions.values():
            self.now += 1
            names[instruction.name] = self._of(instruction, names, home, arguments)
        return names[home.root]

    def share(self) -> None:
        """Give results of elementwise operations the memory of an operand of their size that nobody reads afterwards."""
        for at, operands, results in self.dying:
            for result in results:
                taken = result.root()
                for operand in operands:
                    giver = operand.root()
                    fits = giver.bytes == taken.bytes and giver.space == taken.space
                    if giver is not taken and fits and giver.end == at and giver.kind == taken.kind == "temp":
                        self._join(giver, taken)
                        break

    def _of(self, one: Instruction, names: dict[str, _Pieces], home: Computation, arguments: _Pieces | None) -> _Pieces:
        if one.opcode == "parameter":
            return self._made(one, "argument") if arguments is None else self._argument(one, home, arguments)
        if one.opcode == "get-tuple-element":
            return self._part(one, names, home)
        operands = [names.get(name, []) for name in one.operands]
        given = [piece for pieces in operands for piece in pieces]
        self._used(given, "" if one.opcode in _PASSING else one.op_name)
        if one.opcode == "tuple" or one.opcode in ALIASES:
            return given
        if one.opcode in WITHOUT_MEMORY:
            return self._made(one, "none")
        if one.opcode == "while":
            return self._loop(one, given)
        if one.opcode == "conditional":
            return self._branches(one, operands)
        if one.opcode == "call":
            return self.run(self.module.computations[called(one, "to_apply")[0]], given)
        if one.opcode.endswith("-done"):
            return self._done(one, operands, home)
        if one.opcode.endswith("-start") and one.shape.dtype == "tuple":
            return self._started(one, given)
        return self._result(one, operands, home)

    def _made(self, one: Instruction, kind: str = "temp") -> _Pieces:
        """Memory of its own for each array of the result."""
        arrays = one.shape.arrays
        sizes = list(stored(one.type_text))
        made = [
            _Piece(size.bytes, size.space, self.now, one, shape, kind) for size, shape in zip(sizes, arrays, strict=False)
        ] + [_Piece(0, HBM, self.now, one, shape, kind) for shape in arrays[len(sizes) :]]
        self.pieces += made if kind != "none" else []
        return made

    def _argument(self, one: Instruction, home: Computation, arguments: _Pieces) -> _Pieces:
        inputs = sorted((other for other in home.instructions.values() if other.opcode == "parameter"), key=_number)
        before = sum(len(other.shape.arrays) for other in inputs[: inputs.index(one)])
        return arguments[before : before + len(one.shape.arrays)]

    def _part(self, one: Instruction, names: dict[str, _Pieces], home: Computation) -> _Pieces:
        whole, index = one.operands[0], int(attribute(one, "index") or 0)
        parts = home.instructions[whole].shape.parts
        before = sum(len(part.arrays) for part in parts[:index])
        pieces = names[whole][before : before + len(parts[index].arrays)]
        self._used(pieces)
        return pieces

    def _used(self, pieces: Iterable[_Piece], reader: str = "") -> None:
        for piece in pieces:
            root = piece.root()
            root.end, root.last_read = self.now, reader or root.last_read

    def _join(self, first: _Piece, second: _Piece) -> None:
        """Store both in one buffer, named by what fills it first."""
        first, second = first.root(), second.root()
        if first is second:
            return
        keep, other = (second, first) if second.kind == "argument" else (first, second)
        keep.last_read = other.last_read if other.end > keep.end and other.last_read else keep.last_read or other.last_read
        keep.start, keep.end = min(keep.start, other.start), max(keep.end, other.end)
        keep.bytes, keep.keeps = max(keep.bytes, other.bytes), keep.keeps or other.keeps
        keep.filler = keep.filler or other.filler
        if keep.kind == "none":
            keep.kind, keep.instruction, keep.shape = other.kind, other.instruction, other.shape
        other.joined = keep

    def _loop(self, one: Instruction, state: _Pieces) -> _Pieces:
        (body,), (condition,) = called(one, "body"), called(one, "condition")
        self.run(self.module.computations[condition], state)
        for before, after in zip(state, self.run(self.module.computations[body], state), strict=True):
            self._join(before, after)
        self._used(state)
        return state

    def _branches(self, one: Instruction, operands: list[_Pieces]) -> _Pieces:
        result = self._made(one)
        names = called(one, "branch_computations", "true_computation", "false_computation")
        for name, given in zip(names, operands[1:], strict=True):
            for piece, after in zip(result, self.run(self.module.computations[name], given), strict=True):
                self._join(piece, after)
        self._used(result)
        return result

    def _started(self, one: Instruction, given: _Pieces) -> _Pieces:
        """An asynchronous start's tuple: its operands, what it makes, and a few bytes of context. A copy's: made, operand."""
        made = self._made(one)
        at = len(one.shape.parts[0].arrays) if one.opcode == "copy-start" else 0
        if not _starts_with_operands(one):
            return made
        for piece, operand in zip(made[at : at + len(given)], given, strict=False):
            self._join(operand, piece)
        return made

    def _done(self, one: Instruction, operands: list[_Pieces], home: Computation) -> _Pieces:
        start = home.instructions[one.operands[0]]
        if start.shape.dtype != "tuple" or not _starts_with_operands(start):
            return operands[0]
        first = len(start.shape.parts[0].arrays)
        if one.opcode == "copy-done":
            return operands[0][:first]
        return operands[0][first : first + len(start.shape.parts[1].arrays)]

    def _result(self, one: Instruction, operands: list[_Pieces], home: Computation) -> _Pieces:
        made = self._made(one)
        for index, (target, update) in self._over(one).items():
            if index < len(made) and target < len(operands) and operands[target]:
                self._join(operands[target][0], made[index])
                stack = made[index].root()
                stack.filler = stack.filler or one
                if update is not None and update < len(one.operands):
                    stack.keeps = stack.keeps or self._gathered(one.operands[update], home)
        if one.opcode in ELEMENTWISE or (one.opcode == "fusion" and attribute(one, "kind") == "kLoop"):
            self.dying.append((self.now, [piece for pieces in operands for piece in pieces], made))
        return made

    def _gathered(self, name: str, home: Computation) -> str:
        """The all-gather that a value comes from as it is."""
        source = home.instructions.get(name)
        while source is not None and _passes_on(source) and not self._ends_gather(source):
            source = home.instructions.get(source.operands[0])
        if source is not None and (source.opcode.startswith("all-gather") or self._ends_gather(source)):
            return source.name
        return ""

    def _ends_gather(self, one: Instruction) -> bool:
        """Whether it is the last of the fusions that the TPU compiler spreads a gather over."""
        if one.opcode != "fusion":
            return False
        inner = self.module.computations[called(one, "calls")[0]].instructions.values()
        done = any("AsyncCollectiveDone" in (attribute(part, "custom_call_target") or "") for part in inner)
        return done and any(part.opcode.startswith("all-gather") for part in inner)

    def _over(self, one: Instruction) -> dict[int, tuple[int, int | None]]:
        """Results written over operands: number of the result -> numbers of the operand and, if it is one, of the update."""
        if one.opcode in IN_PLACE:
            return {0: (IN_PLACE[one.opcode], 1 if one.opcode == "dynamic-update-slice" else None)}
        if one.opcode != "fusion":
            return {}
        inner = self.module.computations[called(one, "calls")[0]]
        root = inner.instructions[inner.root]
        results = root.operands if root.opcode == "tuple" else (root.name,)
        found = {index: _overwritten(name, inner) for index, name in enumerate(results)}
        return {index: numbers for index, numbers in found.items() if numbers is not None}


def _starts_with_operands(start: Instruction) -> bool:
    return start.opcode != "all-reduce-start" and len(start.shape.parts) > 1


def _passes_on(one: Instruction) -> bool:
    """Whether the result is the first operand's value, moved, cast or taken out of a tuple."""
    moved = one.opcode in SAME_VALUE or one.opcode in _PASSING
    return bool(one.operands) and (moved or (one.opcode == "fusion" and len(one.operands) == 1))


def _overwritten(name: str, home: Computation) -> tuple[int, int | None] | None:
    """The parameter of a fusion that one of its results updates in place, and the one that is the update."""
    one = _behind(name, home)
    if one.opcode not in IN_PLACE:
        return None
    target = _behind(one.operands[IN_PLACE[one.opcode]], home)
    update = _behind(one.operands[1], home) if one.opcode == "dynamic-update-slice" else one
    if target.opcode != "parameter":
        return None
    return int(target.operands[0]), int(update.operands[0]) if update.opcode == "parameter" else None


def _behind(name: str, home: Computation) -> Instruction:
    """What a value is a view, a copy or a cast of."""
    one = home.instructions[name]
    while one.opcode in SAME_VALUE:
        one = home.instructions[one.operands[0]]
    return one


def _number(parameter: Instruction) -> int:
    return int(parameter.operands[0])
