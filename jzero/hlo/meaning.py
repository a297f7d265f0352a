"""What a collective stands for, where the compiler wrote it as something else.

An all-reduce of which every reader takes one piece is a reduce-scatter. The TPU compiler turns a matrix product with a
gathered or scattered side into a loop of permutes and partial products ("windowed dot": Wang et al., Overlap communication
with dependent computation via decomposition in large deep learning models, 2023).
"""

from typing import Literal, NamedTuple

from jzero.hlo.text import Computation, Instruction, Module, attribute, called

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]

_WINDOWED: dict[str, Kind] = {"windowed_dot_general_body_ag": "all-gather", "windowed_dot_general_body_rs": "reduce-scatter"}

# What may stand between the reduction and the slice: values move or change one by one, none is dropped for good.
_VIEWS = {
    "get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose", "slice",
    "multiply", "add", "negate", "opt-barrier", "all-reduce-done", "async-done",
}  # fmt: skip


class _Inside(NamedTuple):
    """A computation, and the fusion that runs it."""

    home: Computation
    fusion: str = ""
    outer: "_Inside | None" = None


def is_sliced(reduction: Instruction, home: Computation, module: Module, group_size: int) -> bool:
    """Whether all readers of `reduction` are dynamic slices, each of a whole fraction that divides the group size."""
    return _all_slice(reduction.name, _Inside(home), module, group_size)


def sliced_arrays(reduction: Instruction, home: Computation, module: Module, group_size: int) -> tuple[bool, ...]:
    """`is_sliced` for each array of a reduction that combines several."""
    if reduction.shape.dtype != "tuple":
        return (is_sliced(reduction, home, module, group_size),)
    every = home.instructions.values()
    results = {
        reduction.name,
        *(one.name for one in every if one.opcode.endswith("-done") and one.operands[0] == reduction.name),
    }
    parts = [one for one in every if one.opcode == "get-tuple-element" and one.operands[0] in results]

    def sliced(index: int) -> bool:
        readers = [part for part in parts if attribute(part, "index") == str(index)]
        return bool(readers) and all(_all_slice(part.name, _Inside(home), module, group_size) for part in readers)

    return tuple(sliced(index) for index in range(len(reduction.shape.parts)))


def scatter_fusion(instruction: Instruction) -> bool:
    """Whether a fusion is the TPU compiler's `all-reduce-scatter`: an all-reduce and its slice in one operation."""
    return "all-reduce-scatter" in instruction.name + (attribute(instruction, "calls") or "")


def windowed(body: str) -> Kind | None:
    """The collective that a loop with this body does piece by piece, beside a matrix product."""
    return next((kind for name, kind in _WINDOWED.items() if name in body), None)


def beside_windowed(permute: Instruction, home: Computation) -> Kind | None:
    """The same for the permutes before and after such a loop, which have its op_name."""
    loops = (one for one in home.instructions.values() if one.opcode == "while" and one.op_name == permute.op_name)
    return next((kind for loop in loops if (kind := windowed(called(loop, "body")[0]))), None)


def _all_slice(name: str, place: _Inside, module: Module, group_size: int) -> bool:
    if name == place.home.root:
        return place.outer is not None and _all_slice(place.fusion, place.outer, module, group_size)
    readers = [reader for reader in place.home.instructions.values() if name in reader.operands]
    return bool(readers) and all(_slices(reader, name, place, module, group_size) for reader in readers)


def _slices(reader: Instruction, name: str, place: _Inside, module: Module, group_size: int) -> bool:
    if reader.opcode == "dynamic-slice":
        whole, piece = place.home.instructions[name].shape.elements, reader.shape.elements
        return reader.operands[0] == name and 0 < piece < whole and group_size % (whole // piece) == 0
    if reader.opcode == "fusion":
        inner = module.computations[called(reader, "calls")[0]]
        parameters = {int(one.operands[0]): one.name for one in inner.instructions.values() if one.opcode == "parameter"}
        inside = _Inside(inner, reader.name, place)
        read = [parameters[position] for position, operand in enumerate(reader.operands) if operand == name]
        return all(_all_slice(parameter, inside, module, group_size) for parameter in read)
    return reader.opcode in _VIEWS and _all_slice(reader.name, place, module, group_size)
