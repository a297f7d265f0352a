"""Any train step, cut in two where what rests elsewhere enters. Found by tracing.

The *first part* needs none of it: the loss, its gradient, whatever else can be computed beforehand, and it gives back all of
the state that it can. The *second part* is the rest, the optimizer's update. What the first hands to the second is chosen so
that little is in memory between them: where Adam wants a gradient's square and a tenth of it, the gradient is handed over.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jzero import _compat
from jzero._errors import explain
from jzero._tree import num_bytes
from jzero.offload.elementwise import is_elementwise
from jzero.offload.split import WHO, depends_on, reads

Var = Any
RESHAPING = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"})
RESHAPING = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"})


class Cut(NamedTuple):
    """A step in two parts. The state's leaves are its first inputs and its first outputs, by the same numbers."""

    jaxpr: Any  # of the whole step; its constants are leading inputs
    consts: list[Any]
    num_state: int
    updated: tuple[int, ...]  # leaves that the first part sees and the second makes new, as parameters
    handed: list[Var]  # what the first part hands to the second: values, and inputs that the second does not get otherwise

    @property
    def state(self) -> list[Var]:
        return list(self.jaxpr.invars[len(self.consts) :][: self.num_state])

    def first(self, outputs: Sequence[bool]) -> tuple[Any, list[bool]]:
        """The program of the chosen outputs and what is handed over; and which inputs it takes."""
        return _compat.prune(_compat.cut(self.jaxpr, self.handed, given=False), [*outputs, *(True,) * len(self.handed)])

    def second(self, outputs: Sequence[bool]) -> tuple[Any, list[Var]]:
        """The program of the chosen outputs; and its inputs as variables of the whole: among them what is handed over.

        What the step prints and calls it has printed and called by then.
        """
        computed = [var for var in self.handed if var not in set(self.jaxpr.invars)]
        part, used = _compat.prune(_compat.without_effects(_compat.cut(self.jaxpr, computed, given=True)), outputs)
        return part, [var for var, keep in zip([*self.jaxpr.invars, *computed], used, strict=True) if keep]


def cut(jaxpr: Any, num_state: int, away: Iterable[int], paths: Sequence[str]) -> Cut:
    """The step in two parts.

    Args:
      jaxpr: its inputs are the state's leaves and the batch's, its outputs the new leaves and whatever else it returns.
      away: numbers of the leaves that the first part is not to see.
      paths: names of what it returns beside the state, for the error.

    Raises:
      ValueError: something beside the state is computed from those leaves, or printed.
    """
    jaxpr, consts = _compat.without_constants(_compat.inlined(jaxpr))
    state, away = jaxpr.invars[len(consts) :][:num_state], set(away)
    late = _late(jaxpr, {state[index] for index in away})
    is_late = lambda atom: not isinstance(atom, _compat.Literal) and atom in late
    _check(jaxpr, [is_late(atom) for atom in jaxpr.outvars[num_state:]], num_state, paths)
    _check_effects([eqn for eqn in jaxpr.eqns if eqn.effects and any(map(is_late, eqn.invars))])
    updated = tuple(index for index, atom in enumerate(jaxpr.outvars[:num_state]) if is_late(atom) and index not in away)
    given = late | set(jaxpr.invars[: len(consts)]) | {state[index] for index in updated}
    wanted = [jaxpr.outvars[index] for index in (*updated, *sorted(away))]
    handed = _handed(jaxpr, late, given, wanted)
    return Cut(jaxpr, consts, num_state, updated, handed)


def _late(jaxpr: Any, away: set[Var]) -> set[Var]:
    """The values that need something that rests elsewhere."""
    late = set(away)
    for eqn in jaxpr.eqns:
        given = [int(not isinstance(atom, _compat.Literal) and atom in late) for atom in eqn.invars]
        late |= {var for var, yes in zip(eqn.outvars, depends_on(eqn, given), strict=True) if yes}
    return late


def _handed(jaxpr: Any, late: set[Var], given: set[Var], wanted: Sequence[Any]) -> list[Var]:
    """What the second part reads of the first, each followed back to where it was smallest."""
    made_by = {var: (number, eqn) for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    is_handed = lambda atom: not isinstance(atom, _compat.Literal) and atom not in given
    read = [atom for eqn in jaxpr.eqns if late & set(eqn.outvars) for atom in eqn.invars]
    found: dict[Var, None] = {}
    for var in dict.fromkeys(filter(is_handed, [*read, *wanted])):
        found |= _followed_back(var, made_by, is_handed)
    return list(found)


def _followed_back(var: Var, made_by: dict[Var, tuple[int, Any]], is_handed: Callable[[Any], bool]) -> dict[Var, None]:
    """The values that `var` can be computed from again, element by element, and that together are smallest, then earliest.

    The latest value is opened first, so that what was made of one value in two ways comes together again. Of another shape it
    must be smaller: a gradient is to have the shape of its parameter, and so its place.
    """

    def is_open(one: Var) -> bool:
        if one.aval.size < 2 or one not in made_by or len(made_by[one][1].outvars) > 1:
            return False
        return is_elementwise(made_by[one][1]) or made_by[one][1].primitive.name in RESHAPING

    size = lambda values: sum(num_bytes(one.aval) for one in values if one.aval.size > 1)
    values = best = {var: None}
    is_reshaped = False
    while opened := max(filter(is_open, values), key=lambda one: made_by[one][0], default=None):
        values = {one: None for one in values if one is not opened}
        values |= dict.fromkeys(filter(is_handed, made_by[opened][1].invars))
        is_reshaped |= made_by[opened][1].primitive.name in RESHAPING
        if size(values) < size(best) or (size(values) == size(best) and not is_reshaped):
            best = values
    return best


def handed_to(part: Any, inputs: Sequence[Var], handed: Sequence[Var]) -> list[int]:
    """For each output of the second part what it reads of `handed`, as bits."""
    position = {var: at for at, var in enumerate(handed)}
    return reads(part, [1 << position[var] if var in position else 0 for var in inputs])


def _check_effects(late: Sequence[Any]) -> None:
    """What a step prints, or calls back, comes from its first part."""
    if late:
        found = [f"{eqn.primitive.name} from {_compat.where(eqn)}" for eqn in late[:10]]
        context = "a bucket of leaves is updated at a time, in a program of its own"
        fix = "Look at moments after the step, in the state that it returns, or keep opt_state on the device."
        raise ValueError(
            explain(WHO, "the step prints or calls back what rests elsewhere", found=found, context=context, fix=fix)
        )


def _check(jaxpr: Any, is_late: Sequence[bool], num_state: int, paths: Sequence[str]) -> None:
    """What a step returns beside the state comes from its first part."""
    rows = []
    for path, yes, atom in zip(paths, is_late, jaxpr.outvars[num_state:], strict=True):
        if yes:
            made_by = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
            rows.append(f"{path}   from {_compat.where(made_by)}" if made_by is not None else path)
    if rows:
        context = "a bucket of leaves is updated at a time, when the rest of the optimizer's state is not on the device"
        fix = "Return what is known from gradients and parameters (norms, the loss), or keep opt_state on the device."
        problem = f"{len(rows)} of the values that the step returns need what rests elsewhere"
        raise ValueError(explain(WHO, problem, found=rows[:10], context=context, fix=fix))
