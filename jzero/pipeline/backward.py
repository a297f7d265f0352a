"""One layer's forward and backward pass as programs that run in different ticks, and what must be kept from one to the other.

    forward       params, x            -> y, saved          what the backward pass reads and cannot have from the parameters
    backward      params, saved, dy    -> dx, dparams
    input_grad    params, saved, dy    -> dx, kept          the half that the pipe stage before waits for
    weight_grad   params, saved, kept  -> dparams           the other half: for a dense layer the products x^T dy alone

The programs are cut out of the layer's own derivative: of its jaxpr `input_grad` takes what dx needs, `weight_grad` what is
left, and `kept` is where the cut runs. Under a remat policy `saved` is what the policy saves.
Qi, Wan, Huang, Lin: Zero Bubble Pipeline Parallelism, 2023 (the cut).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jzero import _compat

# Computed again by weight_grad rather than kept beside what they are made of.
CHEAP = frozenset(["transpose", "reshape", "broadcast_in_dim", "squeeze", "convert_element_type", "neg", "copy", "slice"])

Shapes = tuple[jax.ShapeDtypeStruct, ...]
Layer = Callable[[list[Any], list[Any]], list[Any]]  # params, x -> y


class Residual(NamedTuple):
    """Where backward finds one of its inputs: a parameter, a value that parameters alone determine, or a saved value."""

    source: str  # "param", "known" or "saved"
    index: int


class LayerPrograms:
    """The four programs of one layer, on flat lists of arrays. `mask` says which parameters have a gradient."""

    def __init__(
        self, layer: Callable[[list[Any], list[Any]], list[Any]], params: Sequence[Any], mask: Sequence[bool], x: Sequence[Any]
    ):
        self.params, self.mask, self.num_x = tuple(params), tuple(mask), len(x)
        self._trace(layer, list(params), list(x))
        self._cut()

    def _trace(self, layer: Callable[..., Any], params: list[Any], x: list[Any]) -> None:
        found: list[Any] = []

        def forward(params: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            def run(trained: list[Any], x: list[Any]) -> list[Any]:
                fresh = iter(trained)
                return layer([next(fresh) if yes else leaf for leaf, yes in zip(params, self.mask, strict=True)], x)

            out, backward = jax.vjp(run, [leaf for leaf, yes in zip(params, self.mask, strict=True) if yes], x)
            leaves, treedef = jax.tree.flatten(backward)
            found[:] = [treedef, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]]
            return out, leaves

        self.jaxpr = jax.make_jaxpr(forward)(params, x)
        treedef, residuals = found
        run_backward = lambda leaves, dy: jax.tree.unflatten(treedef, leaves)(dy)
        self.back = jax.make_jaxpr(run_backward)(residuals, x)
        self._sort_residuals()

    def _sort_residuals(self) -> None:
        """Parameters are at hand in every tick, and so is what they alone determine (a transpose): only the rest is saved."""
        jaxpr, _ = _compat.open_jaxpr(self.jaxpr)
        params = {id(var): index for index, var in enumerate(jaxpr.invars[: len(self.params)])}
        moving = _reached(jaxpr, jaxpr.invars[len(self.params) :])
        saved: dict[int, int] = {}
        self.residuals, self._saved_vars, self._known_vars = [], [], []
        for var in jaxpr.outvars[self.num_x :]:
            if id(var) in params:
                self.residuals.append(Residual("param", params[id(var)]))
            elif id(var) in moving:
                if id(var) not in saved:
                    saved[id(var)] = len(self._saved_vars)
                    self._saved_vars.append(var)
                self.residuals.append(Residual("saved", saved[id(var)]))
            else:
                self.residuals.append(Residual("known", len(self._known_vars)))
                self._known_vars.append(var)
        self.saved: Shapes = tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self._saved_vars)

    def _cut(self) -> None:
        """Which equations of the backward pass each half runs, and the values that cross."""
        jaxpr, _ = _compat.open_jaxpr(self.back)
        num_trained = sum(self.mask)
        first = {id(eqn) for eqn in _needed(jaxpr, jaxpr.outvars[num_trained:])}
        is_saved = [residual.source == "saved" for residual in self.residuals]
        data = [var for var, yes in zip(jaxpr.invars, is_saved, strict=False) if yes] + jaxpr.invars[len(self.residuals) :]
        moving = _reached(jaxpr, data)
        dy = {id(var) for var in jaxpr.invars[len(self.residuals) :]}
        wanted = {id(var): var for var in jaxpr.outvars[:num_trained] if _is_var(var)}
        self._second, kept = [], {}
        for eqn in reversed(jaxpr.eqns):
            made = [var for var in eqn.outvars if id(var) in wanted]
            if not made:
                continue
            again = id(eqn) not in first or eqn.primitive.name in CHEAP or _has_body(eqn) or id(made[0]) not in moving
            if again:
                self._second.append(eqn)
                wanted |= {id(var): var for var in eqn.invars if _is_var(var)}
            else:
                kept |= {id(var): var for var in made}
        kept |= {key: var for key, var in wanted.items() if key in dy}
        self._second.reverse()
        self._kept_vars = list(kept.values())
        self.kept: Shapes = tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self._kept_vars)

    def forward(self, params: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = _compat.open_jaxpr(self.jaxpr)
        out = jaxpr.outvars[: self.num_x]
        values = _run(jaxpr, consts, [*params, *x], _needed(jaxpr, [*out, *self._saved_vars]), [*out, *self._saved_vars])
        return values[: self.num_x], values[self.num_x :]

    def backward(self, params: Sequence[Any], saved: Sequence[Any], dy: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = _compat.open_jaxpr(self.back)
        out = _run(jaxpr, consts, [*self._inputs(params, saved), *dy], jaxpr.eqns, jaxpr.outvars)
        num_trained = sum(self.mask)
        return out[num_trained:], out[:num_trained]

    def input_grad(self, params: Sequence[Any], saved: Sequence[Any], dy: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = _compat.open_jaxpr(self.back)
        wanted = [*jaxpr.outvars[sum(self.mask) :], *self._kept_vars]
        out = _run(jaxpr, consts, [*self._inputs(params, saved), *dy], _needed(jaxpr, wanted), wanted)
        return out[: self.num_x], out[self.num_x :]

    def weight_grad(self, params: Sequence[Any], saved: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        jaxpr, consts = _compat.open_jaxpr(self.back)
        known = dict(zip(map(id, self._kept_vars), kept, strict=True))
        nothing = [None] * (len(jaxpr.invars) - len(self.residuals))
        inputs = [*self._inputs(params, saved), *nothing]
        return _run(jaxpr, consts, inputs, self._second, jaxpr.outvars[: sum(self.mask)], known)

    def _inputs(self, params: Sequence[Any], saved: Sequence[Any]) -> list[Any]:
        """Backward's residuals again."""
        jaxpr, consts = _compat.open_jaxpr(self.jaxpr)
        nothing = [None] * (len(jaxpr.invars) - len(self.params))
        known = _run(jaxpr, consts, [*params, *nothing], _needed(jaxpr, self._known_vars), self._known_vars)
        sources = {"param": params, "known": known, "saved": saved}
        return [sources[residual.source][residual.index] for residual in self.residuals]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, _compat.Literal)


def _has_body(eqn: Any) -> bool:
    """Calls and loops: half of one may be dead in either half, which the compiler removes."""
    return any(hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in eqn.params.values())


def _reached(jaxpr: Any, sources: Sequence[Any]) -> set[int]:
    """Variables that depend on `sources`, by identity."""
    found = {id(var) for var in sources}
    for eqn in jaxpr.eqns:
        if any(id(atom) in found for atom in eqn.invars if _is_var(atom)):
            found |= {id(var) for var in eqn.outvars}
    return found


def _needed(jaxpr: Any, outputs: Sequence[Any]) -> list[Any]:
    """The equations that `outputs` depend on, in order."""
    wanted, found = {id(atom) for atom in outputs if _is_var(atom)}, []
    for eqn in reversed(jaxpr.eqns):
        if any(id(var) in wanted for var in eqn.outvars):
            found.append(eqn)
            wanted |= {id(atom) for atom in eqn.invars if _is_var(atom)}
    return found[::-1]


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], eqns: Sequence[Any], outputs: Sequence[Any],
    known: dict[int, Any] | None = None,
) -> list[Any]:  # fmt: skip
    """Some equations of a jaxpr, and the values of `outputs` after them."""
    values = dict(zip(map(id, jaxpr.constvars), consts, strict=True)) | dict(zip(map(id, jaxpr.invars), args, strict=True))
    values |= known or {}
    read = lambda atom: values[id(atom)] if _is_var(atom) else atom.val
    for eqn in eqns:
        values |= dict(zip(map(id, eqn.outvars), _compat.bind(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in outputs]
