"""Arithmetic on known uniform constants, done for both programs: how a mean's divisor and an index's wrap-around are read."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jzero.reduction.equation import Equation
from jzero.reduction.states import Constant


def divide(a: np.ndarray, b: np.ndarray) -> Any:
    return np.trunc(a / b) if np.issubdtype(a.dtype, np.integer) else a / b


FUNCTIONS = {
    "abs": np.abs, "add": np.add, "and": np.bitwise_and, "ceil": np.ceil, "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": np.asarray, "div": divide, "eq": np.equal, "exp": np.exp, "floor": np.floor, "ge": np.greater_equal,
    "gt": np.greater, "is_finite": np.isfinite, "le": np.less_equal, "log": np.log, "lt": np.less, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "not": np.invert, "or": np.bitwise_or,
    "pow": np.power, "rem": np.fmod, "rsqrt": lambda x: 1 / np.sqrt(x), "select_n": lambda which, *cases: cases[int(which)],
    "sign": np.sign, "sqrt": np.sqrt, "square": np.square, "sub": np.subtract, "xor": np.bitwise_xor,
}  # fmt: skip

# A uniform array stays uniform, with the same entry, whatever these do to its shape.
REARRANGE = {
    "broadcast_in_dim", "copy", "copy_p", "dynamic_slice", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reshape",
    "rev", "slice", "split", "squeeze", "stop_gradient", "tile", "transpose", "unstack",
}  # fmt: skip
SAME = {"concatenate", "stack"}  # ... and these if all operands are the same


def fold(eq: Equation) -> Constant | None:
    """The result as a constant, if all operands are constants and the primitive is one that is known here."""
    values = [state for state in eq.ins if isinstance(state, Constant)]
    if not values or len(values) < len(eq.ins):
        return None
    if eq.name in REARRANGE or (eq.name in SAME and len(set(values)) == 1):
        return values[0]
    with np.errstate(all="ignore"):
        if eq.name == "reduce_sum":
            return _sum(eq, values[0])
        if eq.name == "integer_pow":
            return _evaluate(eq, values, lambda x: np.power(x, eq.params["y"]))
        return _evaluate(eq, values, FUNCTIONS[eq.name]) if eq.name in FUNCTIONS else None


def constant(small: np.ndarray, large: np.ndarray) -> Constant:
    return Constant(_number(small), _number(large))


def _number(array: np.ndarray) -> Any:
    value = array.reshape(-1)[0].item()
    return np.nan if value != value else value  # one nan object, so that equal states compare equal


def _evaluate(eq: Equation, values: Sequence[Constant], function: Callable) -> Constant | None:
    target = eq.out_dtypes[0]
    smalls = [np.asarray(state.small, dtype) for state, dtype in zip(values, eq.in_dtypes, strict=True)]
    larges = [np.asarray(state.large, dtype) for state, dtype in zip(values, eq.in_dtypes, strict=True)]
    try:
        return constant(np.asarray(function(*smalls)).astype(target), np.asarray(function(*larges)).astype(target))
    except (TypeError, ValueError, OverflowError):  # a negative integer power, a dtype numpy lacks
        return None


def _sum(eq: Equation, value: Constant) -> Constant:
    source, target = eq.in_shapes[0], eq.out
    counts = [
        np.prod(a, dtype=float) / np.prod(b, dtype=float)
        for a, b in ((source.small, target.small), (source.large, target.large))
    ]
    return Constant(value.small * counts[0], value.large * counts[1])
