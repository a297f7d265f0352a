"""Gather at use for a whole train step that jzero did not write: every axis Auto, the pass only adds sharding constraints.

A constraint never changes a value, so a wrong guess about what is a use costs speed and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jzero import _compat
from jzero.comm import Auto
from jzero.gather.facts import Fact, Facts, Reading
from jzero.gather.rewrite import Level, Tracked, run


class Constrained:
    """Tracked values are ordinary global arrays; `parts` is the array."""

    def __init__(self, reading: Reading, comm: Auto):
        self.reading, self.comm = reading, comm

    def view(self, eqn: Any, tracked: Tracked, rest: Sequence[Any], leaving: Facts) -> list[Tracked]:
        out = _compat.bind(eqn, [tracked.parts, *rest])
        return [Tracked(fact, value) for fact, value in zip(leaving, out, strict=True) if fact is not None]

    def elementwise(self, eqn: Any, values: Sequence[Any], leaving: Fact) -> Tracked:
        """The optimizer: partners of a sharded leaf (its gradient, its moments, the replicated parameter) take its spec."""
        shape = eqn.outvars[0].aval.shape

        def beside(value: Any) -> Any:
            array, split = (value.parts, value.fact.split) if isinstance(value, Tracked) else (value, None)
            moves = leaving.is_split and split != leaving.split and array.shape == shape
            return self.comm.place(array, leaving.split) if moves else array

        args = [
            beside(value) if var.aval.shape == shape else _array(value) for value, var in zip(values, eqn.invars, strict=True)
        ]
        return Tracked(leaving, _compat.bind(eqn, args)[0])

    def use(self, eqn: Any, values: Sequence[Any], needed: Sequence[bool], level: Level) -> list[Any]:
        roots = tuple(value.fact.root for value, need in zip(values, needed, strict=True) if need)
        if not self._shares(roots, level):
            values = self._apart_from_earlier_uses(values, needed, level)
        out = [self._once(value, level, roots) if isinstance(value, Tracked) else value for value in values]
        level.latest = roots
        level.used.update(roots)
        return _compat.bind(eqn, out)

    def _shares(self, roots: tuple[int, ...], level: Level) -> bool:
        """Inside a loop body or remat region one gather serves all uses, as a recomputed forward use and its backward use.
        Outside, only a backward use that follows its forward use at once, as a language model's head does.
        """
        return bool(level.depth) or level.in_remat or level.latest == roots

    def _once(self, tracked: Tracked, level: Level, roots: tuple[int, ...]) -> Any:
        key = id(tracked.parts)
        if key not in level.gathered or not self._shares(roots, level):
            level.gathered[key] = (tracked.parts, self.whole(tracked))
        return level.gathered[key][1]

    def _apart_from_earlier_uses(self, values: Sequence[Any], needed: Sequence[bool], level: Level) -> Sequence[Any]:
        """A second use outside loops is mostly the backward pass. Tie its shard to the other operands, or the compiler merges
        both gathers and the whole weight lives from forward to backward.
        """
        again = [need and value.fact.root in level.used for value, need in zip(values, needed, strict=True)]
        others = [index for index, value in enumerate(values) if not isinstance(value, Tracked) and hasattr(value, "aval")]
        if not any(again) or not others:
            return values
        tied = [index for index, flag in enumerate(again) if flag] + others
        values, moved = list(values), jax.lax.optimization_barrier([_array(values[index]) for index in tied])
        for index, value in zip(tied, moved, strict=True):
            values[index] = Tracked(values[index].fact, value) if isinstance(values[index], Tracked) else value
        return values

    def whole(self, tracked: Tracked) -> Any:
        """Only parameters are gathered; what an optimizer contracts (Muon's momentum) is left to the partitioner."""
        fact = tracked.fact
        return self.comm.gather(tracked.parts, fact.split) if fact.is_param and fact.is_split else tracked.parts

    def enter_loop(self, tracked: Tracked) -> Any:
        return tracked.parts

    def enter_body(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        return list(values)

    def leave_loop(self, value: Any, fact: Fact | None) -> Any:
        return self.comm.place(_array(value), fact.split) if fact is not None else _array(value)

    def remat(self, eqn: Any, fn: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
        return _compat.rebind_remat(eqn, fn, args)


def _array(value: Any) -> Any:
    return value.parts if isinstance(value, Tracked) else value


def constrained(jaxpr: Any, facts: Facts, args: Sequence[Any], *, reading: Reading, comm: Auto) -> list[Any]:
    """Run a train step's jaxpr on global arrays, inputs with a fact being sharded leaves, with a constraint at each use."""
    values = [Tracked(fact, arg) if fact is not None else arg for fact, arg in zip(facts, args, strict=True)]
    return [_array(out) for out in run(Constrained(reading, comm), jaxpr, values, Level())]
