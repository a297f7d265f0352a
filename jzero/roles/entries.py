"""The leaves of a state with what their containers say about them (optax's types, nnx's variable types), names left aside."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jzero._errors import columns, explain
from jzero._tree import is_box, is_key, leaves_with_path, path_parts

Parts = tuple[str, ...]
Kind = Literal["opt", "param", "other", "unknown"]

OPTIMIZER_PACKAGES = ("optax", "jzero.optim")  # NamedTuple states defined here are optimizer state, and so is all below them
VARIABLE_KINDS: dict[str, Kind] = {
    "OptState": "opt",
    "Param": "param",
    "BatchStat": "other",
    "Cache": "other",
    "Intermediate": "other",
    "Perturbation": "other",
    "RngState": "other",
}


class Entry(NamedTuple):
    """One leaf: its path as names, its shape and type, and what its containers' types say it is."""

    parts: Parts
    shape: tuple[int, ...]
    dtype: Any
    kind: Kind
    group: Parts | None  # path of the optimizer state that it belongs to

    @property
    def is_float(self) -> bool:
        return not is_key(self) and jnp.issubdtype(self.dtype, np.inexact)

    @property
    def is_weight_like(self) -> bool:
        """A floating-point array with at least one dim: what parameters and their moments look like."""
        return bool(self.shape) and self.is_float

    @property
    def is_moment_like(self) -> bool:
        """A leaf of an optimizer that may mirror a parameter: a moment's 8-bit codes are integers."""
        return bool(self.shape) and (self.is_float or self.kind == "opt")


def entries(state: Any) -> list[Entry]:
    """Every leaf in flattening order. Raises for leaves that are no arrays."""
    found = [entry for path, node in leaves_with_path(state, _is_typed) for entry in _expand(path_parts(path), node)]
    strange = [(entry.parts, node) for entry, node in found if not _is_array_like(node)]
    if strange:
        raise TypeError(_not_arrays(strange))
    return [entry for entry, _ in found]


def _is_typed(node: Any) -> bool:
    return _is_optimizer_state(node) or is_box(node)


def _is_optimizer_state(node: Any) -> bool:
    kind = type(node)
    return f"{kind.__module__}.".startswith(tuple(f"{name}." for name in OPTIMIZER_PACKAGES)) and not kind.__name__.endswith(
        "Params"
    )  # LookaheadParams


def _expand(prefix: Parts, node: Any) -> list[tuple[Entry, Any]]:
    """The leaves below one node whose type may decide their kind."""
    if _is_optimizer_state(node):
        inner = [(prefix + path_parts(path), leaf) for path, leaf in leaves_with_path(node)]
        return [(_entry(parts, leaf, "opt", prefix), leaf) for parts, leaf in inner]
    if is_box(node):
        kind = _variable_kind(type(node))
        group = _named_group(prefix) if kind == "opt" else None
        inner = jax.tree_util.tree_leaves_with_path(node)  # the first key is the box's own `value`
        return [(_entry(prefix + path_parts(path[1:]), leaf, kind, group), leaf) for path, leaf in inner]
    return [(_entry(prefix, node, "unknown", None), node)]


def _variable_kind(kind: type) -> Kind:
    names = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("flax.")]
    return next((VARIABLE_KINDS[name] for name in names if name in VARIABLE_KINDS), "unknown")


def _named_group(parts: Parts) -> Parts:
    """nnx.Optimizer keeps optax's fields as plain keys below `opt_state`: one group per optimizer."""
    return parts[: parts.index("opt_state") + 1] if "opt_state" in parts else parts[:-1]


def _entry(parts: Parts, leaf: Any, kind: Kind, group: Parts | None) -> Entry:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else _scalar_dtype(leaf)
    return Entry(parts, tuple(np.shape(leaf)) if _is_array_like(leaf) else (), dtype, kind, group)


def _scalar_dtype(leaf: Any) -> Any:
    return jax.dtypes.result_type(leaf) if isinstance(leaf, bool | int | float | complex) else np.dtype(object)


def _is_array_like(leaf: Any) -> bool:
    """An array of numbers or keys, concrete or abstract, or a Python number."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return not isinstance(leaf.dtype, np.dtype) or leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, bool | int | float | complex)


def _not_arrays(strange: Sequence[tuple[Parts, Any]]) -> str:
    rows = [["/".join(parts) or "the state itself", type(leaf).__name__, repr(leaf)[:60]] for parts, leaf in strange]
    fix = (
        "Keep only arrays in the state. For equinox: arrays, static = eqx.partition(model, eqx.is_array); put `arrays` in\n"
        "the state and write model = eqx.combine(arrays, static) inside the step."
    )
    problem = f"{len(rows)} of the state's leaves are no arrays"
    context = "A state's leaves are arrays, ShapeDtypeStructs or Python numbers."
    return explain("jzero.shard", problem, found=columns(rows), context=context, fix=fix)
