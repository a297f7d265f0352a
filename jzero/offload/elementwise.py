"""Which outputs of a traced program depend, element by element, on the same elements of its arrays and on scalars.

Such an output may be computed by slices (`slices.py`), and where each device has a piece of all its arrays it needs no
collective, so that the processors beside each device can compute it (`jzero/engine/computing.py`). Found equation by equation:
all arrays in one have one shape and the operation is known to look at one element at a time.
"""

from collections.abc import Callable
from typing import Any

from jzero import _compat

_NAMES = """
add sub mul div neg sign abs max min pow integer_pow square sqrt rsqrt cbrt exp exp2 log log1p expm1 tanh logistic sin cos erf
select_n clamp convert_element_type reduce_precision copy stop_gradient add_any eq ne lt le gt ge and or not xor is_finite
floor ceil round rem nextafter shift_left shift_right_logical shift_right_arithmetic bitcast_convert_type
"""
ELEMENTWISE = frozenset(_NAMES.split())
# An element that is a function of its place: alike on every device that makes its own piece, but not in a slice of a leaf.
BY_PLACE = frozenset({"iota"})


# What the host's processors cannot run: written for the device, or a call back to Python.
DEVICE_ONLY = frozenset({"pallas_call", "tpu_custom_call", "pure_callback", "io_callback", "debug_callback"})


def obstacles(jaxpr: Any, also: frozenset[str] = frozenset()) -> list[Any]:
    """For each output the first equation that it depends on and that looks at more than one element of an array, or None.

    Args:
      also: names of further operations that may be (`BY_PLACE`).
    """
    return first(jaxpr, lambda eqn: not is_elementwise(eqn, also))


def first(jaxpr: Any, is_one: Callable[[Any], bool]) -> list[Any]:
    """For each output the first equation that it depends on and that `is_one`, or None."""
    met: dict[Any, Any] = {}
    read = lambda atom: None if isinstance(atom, _compat.Literal) else met.get(atom)
    for eqn in jaxpr.eqns:
        before = next((one for one in map(read, eqn.invars) if one is not None), None)
        found = eqn if before is None and is_one(eqn) else before
        met |= dict.fromkeys(eqn.outvars, found)
    return list(map(read, jaxpr.outvars))


def is_for_the_device(eqn: Any) -> bool:
    """Or anything in its body is."""
    inner = [one for body in _compat.inner_jaxprs(eqn) for one in _compat.open_jaxpr(body)[0].eqns]
    return eqn.primitive.name in DEVICE_ONLY or any(map(is_for_the_device, inner))


def is_elementwise(eqn: Any, also: frozenset[str] = frozenset()) -> bool:
    """Or of scalars alone, or one that spreads scalars over an array."""
    name = eqn.primitive.name
    shapes = {atom.aval.shape for atom in (*eqn.invars, *eqn.outvars)} - {()}
    spreads = name == "broadcast_in_dim" and all(atom.aval.shape == () for atom in eqn.invars)
    return not shapes or (len(shapes) == 1 and (name in ELEMENTWISE or name in also or spreads))
