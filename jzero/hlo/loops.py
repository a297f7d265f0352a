"""How often a `while` runs, read from the HLO. CPU and GPU compilers print it; for the TPU's it is worked out.

A counted loop's state holds a counter that starts at a constant, grows by a constant and is compared with a constant.
"""

import operator
import re
from typing import NamedTuple

from jzero.hlo.text import Computation, Instruction, Module, attribute, called

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
_PASSES = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne}
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


class _Value(NamedTuple):
    """`state[index] + offset`, or the constant `offset` where index is None."""

    index: int | None
    offset: int


class _Scope(NamedTuple):
    """A computation, and for a fused one the outer names that its parameters stand for."""

    computation: Computation
    outer: "_Scope | None" = None
    arguments: tuple[str, ...] = ()


def trip_count(loop: Instruction, home: Computation, module: Module) -> int | None:
    """Iterations of the `while` instruction `loop` of the computation `home`, or None where they are not known."""
    if known := _KNOWN.search(loop.attributes):
        return int(known[1])
    compared = _comparison(loop, module)
    body = module.computations[called(loop, "body")[0]]
    if compared is None:
        return None
    left, right, direction = compared
    if left.index is None:
        left, right, direction = right, left, _FLIPPED[direction]
    start = _initial(left, loop, home, module)
    step = _growth(left, body, module)
    bound = right.offset if right.index is None else _initial(right, loop, home, module)
    if left.index is None or start is None or step is None or bound is None:
        return None
    if right.index is not None and _growth(right, body, module) != 0:
        return None
    return _iterations(start, step, bound, direction)


def _iterations(start: int, step: int, bound: int, direction: str) -> int | None:
    """How often `start, start + step, ...` passes the comparison with `bound`; None for endlessly, or a direction unknown."""
    passes = _PASSES.get(direction)
    if passes is None or not passes(start, bound):
        return None if passes is None else 0
    distance = bound - start
    if direction == "NE":
        return distance // step if step and distance % step == 0 and distance // step > 0 else None
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    return -(-(distance + (direction in ("LE", "GE"))) // step) if step > 0 else None


def _comparison(loop: Instruction, module: Module) -> tuple[_Value, _Value, str] | None:
    """Both sides of the loop's condition and its direction."""
    scope = _Scope(module.computations[called(loop, "condition")[0]])
    root = scope.computation.instructions[scope.computation.root]
    while root.opcode in ("fusion", "call"):
        scope = _Scope(module.computations[called(root, "calls", "to_apply")[0]], scope, root.operands)
        root = scope.computation.instructions[scope.computation.root]
    if root.opcode != "compare":
        return None
    left, right = (_value(name, scope, module) for name in root.operands)
    return None if left is None or right is None else (left, right, attribute(root, "direction") or "")


def _initial(value: _Value, loop: Instruction, home: Computation, module: Module) -> int | None:
    """What `value` is before the first iteration."""
    state = home.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or value.index is None:
        return None
    first = _value(state.operands[value.index], _Scope(home), module)
    return None if first is None or first.index is not None else first.offset + value.offset


def _growth(value: _Value, body: Computation, module: Module) -> int | None:
    """By how much the state's element grows in one iteration."""
    result = body.instructions[body.root]
    if result.opcode != "tuple" or value.index is None:
        return None
    after = _value(result.operands[value.index], _Scope(body), module)
    return None if after is None or after.index != value.index else after.offset


def _value(name: str, scope: _Scope, module: Module) -> _Value | None:
    """An instruction as a function of the loop's state; None for anything but constants, elements and their sums."""
    instruction = scope.computation.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return _Value(None, int(instruction.operands[0])) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
    if instruction.opcode == "parameter" and scope.outer is not None:
        return _value(scope.arguments[int(instruction.operands[0])], scope.outer, module)
    if instruction.opcode == "get-tuple-element":
        return _element(instruction, scope, module)
    if instruction.opcode in _SAME_VALUE:
        return _value(instruction.operands[0], scope, module)
    if instruction.opcode in ("add", "subtract"):
        return _sum(instruction, scope, module)
    if instruction.opcode in ("fusion", "call"):
        inner = _Scope(module.computations[called(instruction, "calls", "to_apply")[0]], scope, instruction.operands)
        return _value(inner.computation.root, inner, module)
    return None


def _element(instruction: Instruction, scope: _Scope, module: Module) -> _Value | None:
    index = int(attribute(instruction, "index") or 0)
    source = scope.computation.instructions[instruction.operands[0]]
    if source.opcode == "tuple":
        return _value(source.operands[index], scope, module)
    if source.opcode == "parameter" and scope.outer is None:
        return _Value(index, 0)
    if source.opcode == "fusion":
        inner = _Scope(module.computations[called(source, "calls")[0]], scope, source.operands)
        root = inner.computation.instructions[inner.computation.root]
        return _value(root.operands[index], inner, module) if root.opcode == "tuple" else None
    return None


def _sum(instruction: Instruction, scope: _Scope, module: Module) -> _Value | None:
    left, right = (_value(name, scope, module) for name in instruction.operands)
    if left is None or right is None or (left.index is not None and right.index is not None):
        return None
    if instruction.opcode == "subtract":
        return None if right.index is not None else _Value(left.index, left.offset - right.offset)
    return _Value(left.index if left.index is not None else right.index, left.offset + right.offset)
