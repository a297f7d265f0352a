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
            if not leaving.is_split or split == leaving.split or array.shape != shape:
                return array
            return self.comm.place(array, leaving.split)

        args = [
            beside(value) if var.aval.shape == shape else _array(value) for value, var in zip(values, eqn.invars, strict=True)
        ]
        return Tracked(leaving, _compat.bind(eqn, args)[0])

    def use(self, eqn: Any, values: Sequence[Any], needed: Sequence[bool], level: Level) -> list[Any]:
        roots = tuple(value.fact.root for value, need in zip(values, needed, strict=True) if need)
        backward = _compat.is_backward(eqn)
        at_once = level.in_remat or level.latest == roots
        shared = [need and self._shares(value, level, backward, at_once) for value, need in zip(values, needed, strict=True)]
        tied = self._tied(values, needed, shared, level, at_once)
        out = [
            self._once(value, moved, level, backward, share) for value, moved, share in zip(values, tied, shared, strict=True)
        ]
        level.latest = roots
        level.used.update(roots)
        return _compat.bind(eqn, out)

    def _shares(self, tracked: Tracked, level: Level, backward: bool, at_once: bool) -> bool:
        """Whether a use takes the gather of an earlier one.

        Inside a remat region one gather serves a recomputed forward use and its backward use, and outside one a backward use
        that follows its forward use at once, as a language model's head does. Else uses share in a loop body, where they are
        near, unless one is the forward pass's and one the backward pass's, as in a user's loop over microbatches.
        """
        earlier = level.gathered.get(id(tracked.parts))
        return earlier is not None and (at_once or (bool(level.depth) and earlier[2] == backward))

    def _once(self, value: Any, tied: Any, level: Level, backward: bool, share: bool) -> Any:
        if not isinstance(value, Tracked):
            return tied
        if not share:
            level.gathered[id(value.parts)] = (value.parts, self.whole(tied), backward)
        return level.gathered[id(value.parts)][1]

    def _tied(
        self, values: Sequence[Any], needed: Sequence[bool], shared: Sequence[bool], level: Level, at_once: bool
    ) -> Sequence[Any]:
        """Shards tied to the use's other operands where the compiler would gather them elsewhere: merged with an earlier use's
        gather, so that the whole weight lives from forward to backward, or moved out of a loop in which it is the same.
        """

        def strays(value: Any) -> bool:
            again = value.fact.root in level.used and not at_once
            return again or level.is_constant(value)

        tied = [
            index
            for index, (value, need, share) in enumerate(zip(values, needed, shared, strict=True))
            if need and not share and value.fact.is_param and value.fact.is_split and strays(value)
        ]
        others = [index for index, value in enumerate(values) if not isinstance(value, Tracked) and hasattr(value, "aval")]
        if not tied or not others:
            return values
        # Said to rest as shards: else the partitioner may make the barrier's operand a slice of the earlier use's whole weight.
        shards = [self.comm.place(values[index].parts, values[index].fact.split) for index in tied]
        values, moved = list(values), jax.lax.optimization_barrier([*shards, *(values[index] for index in others)])
        for index, value in zip(tied + others, moved, strict=True):
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
