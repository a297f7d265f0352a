"""The user's own sharding constraints that cannot hold where the batch axes are manual: listed here, dropped by `_compat`."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import NamedSharding

from jzero import _compat


def constraints_on(jaxpr: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """What a program's constraints say of `axes`, and where: `P('data', None) at model.py:41 (layer)`."""
    said = ((eqn.params["sharding"], eqn) for eqn in _constraints(jaxpr))
    lines = (f"{sharding.spec} at {_compat.where(eqn)}" for sharding, eqn in said if _names_any(sharding, frozenset(axes)))
    return tuple(dict.fromkeys(lines))


def _constraints(jaxpr: Any) -> Iterator[Any]:
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _constraints(inner)


def _names_any(sharding: Any, axes: frozenset[str]) -> bool:
    if not isinstance(sharding, NamedSharding):
        return False
    return not axes.isdisjoint(name for entry in sharding.spec for name in (entry if isinstance(entry, tuple) else (entry,)))
