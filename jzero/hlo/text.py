"""Compiled HLO as text, taken apart: computations, instructions, shapes, and where in the user's code each came from.

Reads what `compiled.as_text()` prints on the CPU, TPU and GPU back ends. Attributes stay text until somebody asks, because
back ends write kilobytes of configuration on every line.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"(ENTRY )?{_NAME} \(.*\) -> .* \{{$")
_INSTRUCTION = re.compile(rf"\s+(ROOT )?{_NAME} = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_SOURCE = re.compile(r'source_file="([^"]*)"(?: source_line=(\d+))?')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_TABLE_ROW = re.compile(r"(\d+) (.*)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_CLOSES = {"(": ")", "{": "}", "[": "]"}


class Shape(NamedTuple):
    """An array, or a tuple of shapes (`dtype` is then "tuple")."""

    dtype: str
    dims: tuple[int, ...] = ()
    parts: tuple["Shape", ...] = ()

    @property
    def arrays(self) -> tuple["Shape", ...]:
        """The arrays in it, left to right."""
        return (self,) if self.dtype != "tuple" else tuple(leaf for part in self.parts for leaf in part.arrays)

    @property
    def elements(self) -> int:
        return sum(math.prod(array.dims) for array in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(math.prod(array.dims) * bits(array.dtype) // 8 for array in self.arrays)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]  # names; for constants and parameters the text in the parentheses
    attributes: str  # as printed; `attribute` reads one of them
    type_text: str = ""  # the shape as printed, with its layouts

    @property
    def op_name(self) -> str:
        """The path of JAX names that made it, such as `jit(step)/while/body/dot_general`."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A named list of instructions in execution order."""

    name: str
    instructions: dict[str, Instruction]
    root: str


class Module:
    """A parsed HLO module. `header` is its first line, less `HloModule `."""

    def __init__(self, header: str, computations: dict[str, Computation], entry: str, tables: dict[str, dict[int, str]]):
        self.header, self.computations, self.entry, self._tables = header, computations, entry, tables

    @cached_property
    def _frames(self) -> dict[int, str]:
        """`file:line` of the innermost user frame per stack frame id."""
        files, locations = self._tables["FileNames"], self._tables["FileLocations"]
        return {frame: _location(row, locations, files) for frame, row in self._tables["StackFrames"].items()}

    def source(self, instruction: Instruction) -> str:
        """`file:line` of the user code that made the instruction, or the empty string."""
        if direct := _SOURCE.search(instruction.attributes):
            return f"{direct[1]}:{direct[2] or 0}"
        frame = _FRAME.search(instruction.attributes)
        return self._frames.get(int(frame[1]), "") if frame else ""


def parse(text: str) -> Module:
    """Take apart the text of one HLO module.

    Args:
      text: what `jax.stages.Compiled.as_text()` returns.

    Returns:
      The module. `module.computations[module.entry]` is where it starts.

    Raises:
      ValueError: the text holds no ENTRY computation.

    Example:
      >>> module = parse("HloModule m\\n\\nENTRY %e (p: f32[4]) -> f32[4] {\\n  ROOT %p = f32[4]{0} parameter(0)\\n}")
      >>> module.computations["e"].instructions["p"].shape
      Shape(dtype='f32', dims=(4,), parts=())
    """
    header, entry, table, name, root = "", "", None, None, ""
    body: dict[str, Instruction] = {}
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {title: {} for title in _TABLES}
    for line in _lines(text):
        if line in tables:
            table = tables[line]
        elif line.startswith("HloModule"):
            header = line.removeprefix("HloModule ")
        elif opened := _COMPUTATION.match(line):
            name, body, root, table = opened[2], {}, "", None
            entry = name if opened[1] else entry
        elif name is not None and line.startswith("}"):
            computations[name], name = Computation(name, body, root), None
        elif name is not None and (begun := _INSTRUCTION.match(line)):
            body[begun[2]] = _instruction(begun[2], line[begun.end() :])
            root = begun[2] if begun[1] else root
        elif table is not None and (row := _TABLE_ROW.match(line)):
            table[int(row[1])] = row[2]
    if not entry:
        raise ValueError("jzero.hlo.parse: the text holds no ENTRY computation; pass what compiled.as_text() returns")
    return Module(header, computations, entry, tables)


def _lines(text: str) -> Iterator[str]:
    """Lines; an instruction that is printed over several, as one with a kernel's metadata is, put on one."""
    held: list[str] = []
    for line in text.splitlines():
        if not held and not line.endswith("={"):
            yield line
            continue
        held.append(line)
        if line.startswith("}}"):
            yield "".join(held)
            held = []
    yield from held


def attribute(instruction: Instruction, name: str) -> str | None:
    """The text after `name=` up to the comma that ends it, or None."""
    return value_after(instruction.attributes, name)


def value_after(text: str, name: str) -> str | None:
    """The value of `name=` in comma-separated text; brackets and quotes inside it are balanced."""
    found = re.search(rf"(?:^|, ){re.escape(name)}=", text)
    return text[found.end() : _end(text, found.end())].strip() if found else None


def bits(dtype: str) -> int:
    """Bits per element of an HLO dtype; 0 for tokens and opaque values."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return 8 if dtype == "pred" else int(found[1]) if found else 0


def called(instruction: Instruction, *names: str) -> tuple[str, ...]:
    """The computations that the named attributes refer to, in order."""
    values = (attribute(instruction, name) for name in names)
    return tuple(found for value in values if value for found in re.findall(_NAME, value))


def _instruction(name: str, text: str) -> Instruction:
    end = _end(text, 0, stop=" ")
    shape = _shape(text[:end])
    opening = text.index("(", end)
    closing = _end(text, opening + 1, stop=")")
    operands = tuple(_operand(part) for part in split(_COMMENT.sub("", text[opening + 1 : closing])))
    return Instruction(name, text[end:opening].strip(), shape, operands, text[closing + 1 :].lstrip(", "), text[:end])


def _operand(text: str) -> str:
    """`%x` or, with its type printed, `f32[2]{0} %x`."""
    return text.rsplit("%", 1)[-1].strip() if "%" in text else text.strip()


def _shape(text: str) -> Shape:
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return Shape("tuple", (), tuple(_shape(part) for part in split(text[1 : text.rindex(")")])))
    found = _ARRAY.match(text)
    if found is None:
        return Shape(text or "token")
    return Shape(found[1], tuple(int(dim.strip(" <=")) for dim in found[2].split(",") if dim.strip()))


def split(text: str) -> list[str]:
    """The parts between the commas that are not inside brackets or quotes."""
    parts, start = [], 0
    while start < len(text):
        end = _end(text, start)
        parts.append(text[start:end])
        start = end + 1
    return [part for part in parts if part.strip()]


def _end(text: str, start: int, stop: str = ",") -> int:
    """Where the first `stop` outside brackets and quotes is, from `start` on."""
    closers: list[str] = []
    position = start
    while position < len(text):
        letter = text[position]
        if letter == '"':
            position = _end_of_string(text, position)
        elif not closers and letter == stop:
            return position
        elif letter in _CLOSES:
            closers.append(_CLOSES[letter])
        elif closers and letter == closers[-1]:
            closers.pop()
        position += 1
    return len(text)


def _end_of_string(text: str, opening: int) -> int:
    closing = text.find('"', opening + 1)
    while closing > 0 and text[closing - 1] == "\\":
        closing = text.find('"', closing + 1)
    return closing if closing > 0 else len(text)


def _location(frame: str, locations: dict[int, str], files: dict[int, str]) -> str:
    """`file:line` of a row of the StackFrames table."""
    place = _fields(locations.get(_fields(frame).get("file_location_id", 0), ""))
    return f"{files.get(place['file_name_id'], '').strip(chr(34))}:{place['line']}" if "line" in place else ""


def _fields(row: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", row)}
