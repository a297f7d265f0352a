"""Runs a jaxpr again with some values tracked as shards, handing each kind of equation to the strategy of an engine.

A strategy says what a tracked value is made of (`parts`), how a view acts on it, and how it becomes whole. This file
only walks: it knows every call-like primitive, and no collective.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from jzero import _compat
from jzero.gather.facts import Fact, Facts, Reading, Transfer, inner_jaxpr, per_iteration, rooted


class Tracked:
    """A value that is still a shard: its fact, and its parts as arrays. A pytree, so it passes through loops."""

    def __init__(self, fact: Fact, parts: Any):
        self.fact, self.parts = fact, parts


class Strategy(Protocol):
    """What the two engines do differently."""

    reading: Reading

    def view(self, eqn: Any, tracked: Tracked, rest: Sequence[Any], leaving: Facts) -> list[Tracked]: ...
    def elementwise(self, eqn: Any, values: Sequence[Any], leaving: Fact) -> Any: ...
    def use(self, eqn: Any, values: Sequence[Any], needed: Sequence[bool], level: "Level") -> list[Any]: ...
    def whole(self, tracked: Tracked) -> Any: ...
    def enter_loop(self, tracked: Tracked) -> Any: ...
    def enter_body(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]: ...
    def leave_loop(self, value: Any, fact: Fact | None) -> Any: ...
    def remat(self, eqn: Any, fn: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]: ...


class Level:
    """Where an equation stands: in how many loops, inside a remat region or not, and what was already used here."""

    def __init__(self, depth: int = 0, in_remat: bool = False, num_constants: int = 0):
        self.depth, self.in_remat = depth, in_remat
        self.num_constants = num_constants  # the first inputs of a loop's body are the same in every iteration
        self.latest: Any = None  # which parameter was used last, if nothing else was since
        self.used: set[Any] = set()
        # id of a shard -> the shard itself, its whole, and whether that was made for the backward pass
        self.gathered: dict[int, tuple[Any, Any, bool]] = {}

    def loop(self, num_constants: int = 0) -> "Level":
        return Level(self.depth + 1, self.in_remat, num_constants)

    def is_constant(self, tracked: Tracked) -> bool:
        """Whether it is the same in every iteration of the loop here, so that the compiler may move its gather out."""
        return bool(self.depth) and tracked.fact.root < self.num_constants

    def remat(self) -> "Level":
        return Level(self.depth, True, self.num_constants)


def run(strategy: Strategy, jaxpr: Any, values: Sequence[Any], level: Level) -> list[Any]:
    """Evaluate `jaxpr` on arrays and `Tracked` values; outputs that are still shards come back tracked."""
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, _compat.Literal) else known[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        facts = [value.fact if isinstance(value, Tracked) else None for value in inputs]
        with _compat.provenance(eqn):
            known.update(zip(eqn.outvars, _step(strategy, eqn, inputs, facts, level), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _step(strategy: Strategy, eqn: Any, inputs: list[Any], facts: Facts, level: Level) -> list[Any]:
    if not any(facts):
        return _compat.bind(eqn, inputs)
    transfer = strategy.reading.transfer(eqn, facts)
    needed = [fact is not None and enters is None for fact, enters in zip(facts, transfer.entering, strict=True)]
    match transfer.kind:
        case "view":
            return strategy.view(eqn, inputs[0], inputs[1:], transfer.leaving)
        case "elementwise":
            (leaving,) = transfer.leaving
            assert leaving is not None
            return [strategy.elementwise(eqn, inputs, leaving)]
        case "barrier":
            return _barrier(eqn, inputs)
        case "plain":
            return _compat.bind(eqn, [_plain(value) for value in inputs])  # a reduction: the partitioner's work
        case "use":
            return strategy.use(eqn, inputs, needed, level)
        case kind:
            level.latest = None
            ready = [strategy.whole(value) if need else value for value, need in zip(inputs, needed, strict=True)]
            return _NESTED[kind](strategy, eqn, ready, transfer, level)


def _barrier(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The user's barrier orders what it orders; a shard passes by it, since its gather comes later anyway."""
    plain = iter(jax.lax.optimization_barrier([value for value in inputs if not isinstance(value, Tracked)]))
    return [value if isinstance(value, Tracked) else next(plain) for value in inputs]


def _plain(value: Any) -> Any:
    return value.parts if isinstance(value, Tracked) else value


def _inline(strategy: Strategy, eqn: Any, values: list[Any], transfer: Transfer, level: Level) -> list[Any]:
    return run(strategy, inner_jaxpr(eqn), values, level)


def _remat(strategy: Strategy, eqn: Any, values: list[Any], transfer: Transfer, level: Level) -> list[Any]:
    leaving: list[Fact | None] = []

    def body(*args: Any) -> list[Any]:
        out = run(strategy, inner_jaxpr(eqn), wrap(args, transfer.entering), level.remat())
        leaving[:] = [value.fact if isinstance(value, Tracked) else None for value in out]
        return [value.parts if isinstance(value, Tracked) else value for value in out]

    out = strategy.remat(eqn, body, [_plain(value) for value in values])
    return wrap(out, leaving)


def wrap(parts: Sequence[Any], facts: Facts) -> list[Any]:
    """Parts back into tracked values, where there is a fact."""
    return [Tracked(fact, part) if fact is not None else part for part, fact in zip(parts, facts, strict=True)]


def _scan(strategy: Strategy, eqn: Any, values: list[Any], transfer: Transfer, level: Level) -> list[Any]:
    parts = _compat.scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    entering = rooted((*transfer.entering[:start], *map(per_iteration, transfer.entering[start:])))
    args = [strategy.enter_loop(value) if isinstance(value, Tracked) else value for value in values]
    consts, carry, xs = args[: parts.num_consts], args[parts.num_consts : start], args[start:]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        inputs = strategy.enter_body(parts.body, wrap([*consts, *carry, *xs], entering))
        # Compilers dissolve a loop of one iteration: what stands in it stands outside.
        inside = level.loop(parts.num_consts) if parts.length > 1 else Level(level.depth, level.in_remat)
        out = run(strategy, parts.body, inputs, inside)
        expected = (*entering[parts.num_consts : start], *(_stacked_inside(transfer.leaving[parts.num_carry :])))
        out = [strategy.leave_loop(value, fact) for value, fact in zip(out, expected, strict=True)]
        return out[: parts.num_carry], out[parts.num_carry :]

    carry, ys = jax.lax.scan(body, carry, xs, length=parts.length, reverse=parts.reverse, unroll=parts.unroll)
    return wrap([*carry, *ys], transfer.leaving)


def _stacked_inside(leaving: Facts) -> tuple[Fact | None, ...]:
    return tuple(fact and fact._replace(split=fact.split[1:]) for fact in leaving)


def _while(strategy: Strategy, eqn: Any, values: list[Any], transfer: Transfer, level: Level) -> list[Any]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    args = [strategy.enter_loop(value) if isinstance(value, Tracked) else value for value in values]
    cond_consts, body_consts, carry = args[:num_cond], args[num_cond : num_cond + num_body], args[num_cond + num_body :]
    entering = rooted(transfer.entering[num_cond:])

    def go_on(carry: list[Any]) -> Any:
        wholes = [strategy.whole(value) if isinstance(value, Tracked) else value for value in wrap(carry, entering[num_body:])]
        return run(strategy, eqn.params["cond_jaxpr"], [*cond_consts, *wholes], level.loop())[0]

    def body(carry: list[Any]) -> list[Any]:
        inputs = strategy.enter_body(eqn.params["body_jaxpr"], wrap([*body_consts, *carry], entering))
        out = run(strategy, eqn.params["body_jaxpr"], inputs, level.loop(num_body))
        return [strategy.leave_loop(value, fact) for value, fact in zip(out, entering[num_body:], strict=True)]

    return wrap(jax.lax.while_loop(go_on, body, carry), transfer.leaving)


def _cond(strategy: Strategy, eqn: Any, values: list[Any], transfer: Transfer, level: Level) -> list[Any]:
    index, *operands = values
    entering = rooted(transfer.entering[1:])

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def chosen(*args: Any) -> list[Any]:
            out = run(strategy, jaxpr, wrap(args, entering), level.loop())
            return [strategy.leave_loop(value, fact) for value, fact in zip(out, transfer.leaving, strict=True)]

        return chosen

    branches, args = [branch(jaxpr) for jaxpr in eqn.params["branches"]], [_plain(value) for value in operands]
    if platforms := eqn.params.get("branches_platforms"):  # one branch per platform: the others may not even lower
        chosen = {name: branch for names, branch in zip(platforms, branches, strict=True) for name in names or ("default",)}
        return wrap(jax.lax.platform_dependent(*args, **chosen), transfer.leaving)
    return wrap(jax.lax.switch(index, branches, *args), transfer.leaving)


_NESTED: dict[str, Callable[[Strategy, Any, list[Any], Transfer, Level], list[Any]]] = {
    "inline": _inline,
    "remat": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
