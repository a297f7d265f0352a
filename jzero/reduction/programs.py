"""The loss as two programs, traced at two batch sizes and read in lockstep. Shapes only: nothing is computed."""

import functools
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core

from jzero.reduction.fold import constant
from jzero.reduction.states import INDEPENDENT, AnyState, OwnIndex, Shapes, Sized

DIFFERENT = "the program itself depends on the batch size"
MAX_READ = 1 << 16  # closed-over arrays up to this size are searched for a uniform value


class DifferentPrograms(Exception):
    """The two programs do not have the same equations in the same order."""


class Context(NamedTuple):
    """What holds for a whole walk. `call`: the innermost `jit` being walked, for the line of the user's call."""

    batch: int
    factor: int
    steps: Mapping[str, Callable]  # how to walk into the primitives that have bodies
    derivatives: bool = True
    call: tuple[str, str] | None = None  # the jitted function's name, the line that calls it

    def shapes(self, small: Any, large: Any) -> Shapes:
        """The shapes of one variable in both programs."""
        a, b = tuple(small.aval.shape), tuple(large.aval.shape)
        if len(a) != len(b):
            raise DifferentPrograms
        return Shapes(a, b, self.batch, self.factor)


def trace(fn: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Any:
    return jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args))


def enlarged(args: Sequence[Any], batch_dims: Sequence[int | None], factor: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of `args` at `factor` times the batch size."""
    shapes = [
        tuple(size * factor if d == dim else size for d, size in enumerate(arg.shape))
        for arg, dim in zip(args, batch_dims, strict=True)
    ]
    return [jax.ShapeDtypeStruct(shape, arg.dtype) for shape, arg in zip(shapes, args, strict=True)]


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jax_core.Literal)


def lockstep(small: Any, large: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of equations whose results are used. Those that only print are left out."""
    pairs = list(zip(_live(small), _live(large), strict=False))
    if len(_live(small)) != len(_live(large)):
        raise DifferentPrograms(source_line(pairs[-1][0]) if pairs else "")
    for a, b in pairs:
        if a.primitive is not b.primitive or len(a.invars) != len(b.invars) or len(a.outvars) != len(b.outvars):
            raise DifferentPrograms(source_line(a))
        yield a, b


def _live(jaxpr: Any) -> list[Any]:
    used, kept = {v for v in jaxpr.outvars if not is_literal(v)}, []
    for eqn in reversed(jaxpr.eqns):
        if not used.isdisjoint(eqn.outvars):
            kept.append(eqn)
            used.update(v for v in eqn.invars if not is_literal(v))
    return kept[::-1]


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, whichever of the two classes this version has."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def inner(params: Mapping[str, Any]) -> Any:
    """The one jaxpr among an equation's parameters, or None."""
    found = [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return found[0] if len(found) == 1 else None


def closed_over(small: Any, large: Any) -> AnyState:
    """The state of an array that the program closes over, or of a literal."""
    if small is large and getattr(small, "size", 0) > MAX_READ:
        return INDEPENDENT
    try:
        a, b = np.asarray(small), np.asarray(large)
    except (TypeError, RuntimeError, ValueError):  # a key array, one spread over hosts, a mutable reference
        return INDEPENDENT if small is large and isinstance(small, jax.Array) else Sized()
    if _uniform(a) and _uniform(b):
        return constant(a, b)
    if a.shape == b.shape and (small is large or _same_memory(a, b) or np.array_equal(a, b)):
        return INDEPENDENT
    counts = a.ndim == b.ndim == 1 and all(np.array_equal(x, np.arange(len(x))) for x in (a, b))
    return OwnIndex(0) if counts else Sized()


def _uniform(array: np.ndarray) -> bool:
    if not 0 < array.size <= MAX_READ or array.dtype.kind not in "biufcV":
        return False
    return array.size == 1 or bool((array == array.reshape(-1)[0]).all())


def _same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides


def changed_params(small: Mapping[str, Any], large: Mapping[str, Any]) -> set[str]:
    """The parameters in which two versions of an equation differ (a reduction's function comes as a jaxpr too)."""
    return {name for name in small if name != "computation" and not _equal(small[name], large.get(name))}


def _equal(a: Any, b: Any) -> bool:
    if a is b or (hasattr(a, "eqns") and str(a) == str(b)):
        return True
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


# moves to _compat
def source_line(eqn: Any, call: tuple[str, str] | None = None) -> str:
    """`file:line (function)` of an equation, and where the user's own code calls it if that line is a library's."""
    frames = [frame for frame in getattr(eqn.source_info.traceback, "frames", ()) if not _is_machinery(frame.file_name)]
    if call and not any(frame.function_name.split(".")[-1] == call[0] for frame in frames):
        return call[1]  # jit caches traces, so the line inside a library function may be another caller's
    if not frames:
        return "an unknown line"
    own = next((frame for frame in frames if not frame.file_name.startswith(_site_packages())), frames[0])
    lines = (f"{frame.file_name}:{frame.line_num} ({frame.function_name})" for frame in (frames[0], own))
    return ", called from ".join(dict.fromkeys(lines))


@functools.cache
def _is_machinery(file: str) -> bool:
    """JAX itself, and Python's library, which site-packages may lie under."""
    in_python = file.startswith((sysconfig.get_path("stdlib"), "<frozen"))
    return file.startswith(os.path.dirname(jax.__file__) + os.sep) or (in_python and not file.startswith(_site_packages()))


@functools.cache
def _site_packages() -> tuple[str, ...]:
    return sysconfig.get_path("purelib"), sysconfig.get_path("platlib")


# moves to _compat
def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and carries a `scan` has: jax 0.11 moved the counts into flat trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)
