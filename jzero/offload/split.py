"""An optimizer's update, cut into a part that looks at all leaves together and parts of one parameter each. Found by tracing.

The traced update takes, per trained parameter, the parameter, its gradient and the optimizer's arrays for it, and beside them
what all share: counters, keys, the loss. Two rules find the parts:

- A scalar that can be computed from gradients and what is shared (a global norm, whether all gradients are finite) is computed
  once, before the buckets: the *early* values. They tie no leaves together.
- Everything else ties together what meets in it. A trust ratio, a factored moment or a matrix iteration ties a parameter to its
  own moments alone. Where two parameters meet there is no update leaf by leaf: refused, with the line.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jzero import _compat
from jzero._errors import explain

WHO = "jzero.Offload"


class Input(NamedTuple):
    """What one input of the traced update is."""

    node: int | None  # the parameter, or array of an owner that is not known, that it belongs to; None is shared
    is_away: bool  # whether only its own bucket sees it: it rests off the device


class Split(NamedTuple):
    """The update in parts."""

    jaxpr: Any  # its constants are leading inputs
    consts: list[Any]
    early: list[Any]  # values that are computed before the buckets
    groups: list[list[int]]  # nodes that are updated together
    late: list[int]  # of the outputs that the first program was to compute, those that it cannot

    def first(self, outputs: Sequence[bool]) -> tuple[Any, list[bool]]:
        """The program of the chosen outputs and the early values; and which inputs it takes."""
        whole = _compat.cut(self.jaxpr, self.early, given=False)
        return _compat.prune(whole, [*outputs, *(True,) * len(self.early)])

    def part(self, outputs: Sequence[bool]) -> tuple[Any, list[bool]]:
        """The program of the chosen outputs, with the early values as further inputs; and which inputs it takes."""
        return _compat.prune(_compat.cut(self.jaxpr, self.early, given=True), outputs)


class _Value(NamedTuple):
    nodes: int = 0  # as bits: what it depends on, other than through early values
    is_at_hand: bool = True  # whether it can be computed before the buckets
    is_early: bool = False


def split(
    jaxpr: Any, inputs: Sequence[Input], num_params: int, names: Sequence[str], *, num_scalars: int = 0,
    owners: Sequence[int] | None = None,
) -> Split:  # fmt: skip
    """The parts of an update.

    Args:
      inputs: one for each input of `jaxpr`.
      num_params: nodes below it are parameters.
      names: of all nodes, for the error.
      num_scalars: the last outputs, which the first program is to compute.
      owners: for each output the node that it belongs to, where that may be none of those that it is computed from.

    Raises:
      ValueError: two parameters meet in something that can be computed only where their moments are.
    """
    jaxpr, consts = _compat.without_constants(_compat.inlined(jaxpr))
    inputs = [*[Input(None, False)] * len(consts), *inputs]
    values: dict[Any, _Value] = {
        var: _Value(0 if one.node is None else 1 << one.node, not one.is_away)
        for var, one in zip(jaxpr.invars, inputs, strict=True)
    }
    meetings = _Meetings(len(names))
    for eqn in jaxpr.eqns:
        operands = [_Value() if isinstance(atom, _compat.Literal) else values[atom] for atom in eqn.invars]
        at_hand = [not away for away in depends_on(eqn, [int(not one.is_at_hand) for one in operands])]
        if (
            all(at_hand)
            and any(one.nodes or one.is_early for one in operands)
            and all(var.aval.size == 1 for var in eqn.outvars)
        ):
            values |= dict.fromkeys(eqn.outvars, _Value(is_early=True))
            continue
        nodes = depends_on(eqn, [one.nodes for one in operands])
        for together in nodes:
            meetings.note(together, eqn)
        values |= {var: _Value(some, is_here) for var, some, is_here in zip(eqn.outvars, nodes, at_hand, strict=True)}
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    for atom, owner in zip(jaxpr.outvars, owners, strict=True) if owners is not None else ():
        if not isinstance(atom, _compat.Literal) and atom in made_by:
            meetings.note(values[atom].nodes | 1 << owner, made_by[atom])
    scalars = jaxpr.outvars[len(jaxpr.outvars) - num_scalars :]
    is_late = lambda var: not isinstance(var, _compat.Literal) and not values[var].is_at_hand
    late = [index for index, var in enumerate(scalars) if is_late(var)]
    groups = meetings.groups()
    _check(groups, num_params, names, meetings)
    return Split(jaxpr, consts, _frontier(jaxpr, values), groups, late)


def depends_on(eqn: Any, given: Sequence[int]) -> list[int]:
    """What each output depends on, as bits. A branch taken by all leaves at once (optax.MultiSteps) ties none together."""
    if eqn.primitive.name != "cond":
        return [_union(given)] * len(eqn.outvars)
    branches = [_through(branch, given[1:]) for branch in eqn.params["branches"]]
    return [given[0] | _union(each) for each in zip(*branches, strict=True)]


def reads(jaxpr: Any, given: Sequence[int]) -> list[int]:
    """What the outputs of a program without constants depend on."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda atom: 0 if isinstance(atom, _compat.Literal) else found[atom]
    for eqn in jaxpr.eqns:
        found |= zip(eqn.outvars, depends_on(eqn, list(map(read, eqn.invars))), strict=True)
    return list(map(read, jaxpr.outvars))


def _through(jaxpr: Any, given: Sequence[int]) -> list[int]:
    """What the outputs of a branch depend on."""
    opened, consts = _compat.without_constants(_compat.inlined(jaxpr))
    return reads(opened, [*[0] * len(consts), *given])


def _union(masks: Sequence[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


def _frontier(jaxpr: Any, values: dict[Any, _Value]) -> list[Any]:
    """The early values that anything else reads."""
    is_early = lambda atom: not isinstance(atom, _compat.Literal) and values[atom].is_early
    later = [eqn for eqn in jaxpr.eqns if not values[eqn.outvars[0]].is_early]
    read = {atom for eqn in later for atom in eqn.invars if is_early(atom)} | {var for var in jaxpr.outvars if is_early(var)}
    return [var for eqn in jaxpr.eqns for var in eqn.outvars if var in read]


class _Meetings:
    """Nodes that depend on each other, and the equations in which they met."""

    def __init__(self, num_nodes: int):
        self.parents, self.seen = list(range(num_nodes)), {}

    def root(self, node: int) -> int:
        while self.parents[node] != node:
            node = self.parents[node]
        return node

    def note(self, nodes: int, eqn: Any) -> None:
        if nodes in self.seen:
            return
        self.seen[nodes] = eqn
        roots = sorted({self.root(index) for index in range(nodes.bit_length()) if nodes >> index & 1})
        for other in roots[1:]:
            self.parents[other] = roots[0]

    def groups(self) -> list[list[int]]:
        found: defaultdict[int, list[int]] = defaultdict(list)
        for node in range(len(self.parents)):
            found[self.root(node)].append(node)
        return list(found.values())


def _check(groups: list[list[int]], num_params: int, names: Sequence[str], meetings: _Meetings) -> None:
    """No group has two parameters."""
    wide = next((group for group in groups if sum(node < num_params for node in group) > 1), None)
    if wide is None:
        return
    num_shared = lambda nodes: sum(nodes >> node & 1 for node in wide)
    most = max(meetings.seen, key=num_shared)
    params = [names[node] for node in wide if node < num_params]
    some = ", ".join(params[:3]) + (", ..." if len(params) > 3 else "")
    _refuse([f"{len(params)} parameters ({some}) meet: {_compat.where(meetings.seen[most])}"])


def _refuse(found: list[str]) -> None:
    context = "each bucket of leaves is updated alone, since all of them never are on the device at once"
    fix = "Move what looks at all leaves before the moments (clip gradients, not updates), or keep opt_state on the device."
    raise ValueError(explain(WHO, "this optimizer's update is not leaf by leaf", found=found, context=context, fix=fix))
