"""Gather at use for a loss that will be differentiated: the gather's transpose is the reduce-scatter of the gradient.

A tracked parameter has up to four parts. `shard` or `whole` carries its value (stage 3 gathers the shard at each use,
stage 2 gathered it once). `sink` or `virtual` receives its gradient: a sink has the shard's shape, and each use reduces
into it; where one level of the program uses a parameter several times (a tied embedding), a `virtual` whole copy, of which
only the gradient ever exists, collects the uses first so that they are reduced once. A frozen leaf has neither.

A wrong rule costs correctness here, so every consumer that is not a view is a use.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero import _compat
from jzero.comm import Comm
from jzero.gather.away import Away, Space
from jzero.gather.facts import CUSTOM_DERIVATIVES, Fact, Facts, Reading, Use, kept_use
from jzero.gather.rewrite import Level, Tracked, run
from jzero.gather.views import on_a_shard


class Parts(NamedTuple):
    """A tracked parameter's value (`shard` or `whole`) and where its gradient goes (`sink` or `virtual`); or both, `away`."""

    shard: Any = None
    whole: Any = None
    sink: Any = None
    virtual: Any = None
    away: Away | None = None

    @property
    def trains(self) -> bool:
        return self.sink is not None or (self.away is not None and self.away.total is not None)


class Differentiable:
    """The strategy of the composed engine; `reduce_dtype` is what gradients travel in."""

    def __init__(self, reading: Reading, comm: Comm, reduce_dtype: Any, kept: Use | None = None):
        self.reading, self.comm, self.reduce_dtype, self.kept = reading, comm, reduce_dtype, kept

    def view(self, eqn: Any, tracked: Tracked, rest: Sequence[Any], leaving: Facts) -> list[Tracked]:
        (fact,) = {fact for fact in leaving if fact is not None}
        if tracked.parts.away is not None:
            return [Tracked(fact, Parts(away=tracked.parts.away.seen(eqn, tracked.fact.split)))]
        counts = tuple(map(self.reading.num_shards, fact.split)) if self.comm.is_local else (1,) * len(fact.split)
        local = on_a_shard(eqn, counts)

        def seen(part: Any, changed: dict[str, Any]) -> list[Any]:
            return [None] * len(leaving) if part is None else _compat.bind(eqn, [part, *rest], **changed)

        shard, whole, sink, virtual, _ = tracked.parts
        parts = zip(seen(shard, local), seen(whole, {}), seen(sink, local), seen(virtual, {}), strict=True)
        return [Tracked(fact, Parts(*part)) for part in parts]

    def elementwise(self, eqn: Any, values: Sequence[Any], leaving: Fact) -> Any:
        raise AssertionError("in a loss every elementwise consumer is a use")

    def use(self, eqn: Any, values: Sequence[Any], needed: Sequence[bool], level: Level) -> list[Any]:
        """The use and its gather in one remat region, so that what is saved for the backward pass is the shard."""
        facts = [value.fact if isinstance(value, Tracked) else None for value in values]

        def apply(*parts: Any) -> list[Any]:
            tied = self._inside_the_loop(parts, values, level)
            args = [part if fact is None else self._whole(part, fact) for part, fact in zip(tied, facts, strict=True)]
            return _compat.bind(eqn, args)

        parts = [value.parts if isinstance(value, Tracked) else value for value in values]
        gathers = any(isinstance(value, Tracked) and value.parts.whole is None for value in values)
        kept = self.kept is not None and self.kept.eqn is eqn
        if kept and eqn.primitive.name in CUSTOM_DERIVATIVES:
            parts = _reduced_first(parts)
        if level.in_remat or not gathers or eqn.effects or kept:
            return apply(*parts)
        comes = any(isinstance(value, Tracked) and value.parts.away is not None for value in values)
        return jax.checkpoint(apply, prevent_cse=level.depth == 0 or comes)(*parts)

    def _inside_the_loop(self, parts: Sequence[Any], values: Sequence[Any], level: Level) -> Sequence[Any]:
        """Shards that are the same in every iteration, tied to the use's other operands so that their gathers stay in the loop:
        moved out, those of the forward and the backward loop would merge, and the weight live whole from one to the other.
        """
        constant = [isinstance(value, Tracked) and value.parts.whole is None and level.is_constant(value) for value in values]
        others = [not isinstance(value, Tracked) and hasattr(value, "aval") for value in values]
        if not any(constant) or not any(others):
            return parts
        shards = [part.shard for part, is_constant in zip(parts, constant, strict=True) if is_constant]
        rest = [part for part, is_other in zip(parts, others, strict=True) if is_other]
        shards, rest = map(iter, jax.lax.optimization_barrier((shards, rest)))

        def tied(part: Any, is_constant: bool, is_other: bool) -> Any:
            return part._replace(shard=next(shards)) if is_constant else next(rest) if is_other else part

        return [tied(*item) for item in zip(parts, constant, others, strict=True)]

    def whole(self, tracked: Tracked) -> Any:
        return self._whole(tracked.parts, tracked.fact)

    def _whole(self, parts: Parts, fact: Fact) -> jax.Array:
        if parts.away is not None:
            return parts.away.arrived(fact.split, self.comm, self.reduce_dtype)
        value = parts.whole if parts.whole is not None else self.comm.gather(jax.lax.stop_gradient(parts.shard), fact.split)
        if parts.virtual is not None:
            return _into_virtual(value, parts.virtual)
        return jax.lax.stop_gradient(value) if parts.sink is None else _into_sink(self._reduction(fact), value, parts.sink)

    def _reduction(self, fact: Fact) -> Callable[[jax.Array], jax.Array]:
        return partial(self.comm.reduce, split=fact.split, dtype=self.reduce_dtype)

    def enter_loop(self, tracked: Tracked) -> Parts:
        return tracked.parts._replace(virtual=None)  # a loop body reduces into its own slice, not into a whole copy

    def enter_body(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        counts = self.reading.count_uses(jaxpr, [value.fact if isinstance(value, Tracked) else None for value in values])
        return [self._collect(value, counts.get(index, 0)) for index, value in enumerate(values)]

    def _collect(self, value: Any, num_uses: int) -> Any:
        if not isinstance(value, Tracked) or value.parts.sink is None or num_uses < 2:
            return value
        counts = map(self.reading.num_shards, value.fact.split)
        shape = value.parts.sink.shape
        if self.comm.is_local:
            shape = tuple(size * count for size, count in zip(shape, counts, strict=True))
        return Tracked(value.fact, value.parts._replace(virtual=_virtual(self._reduction(value.fact), shape, value.parts.sink)))

    def leave_loop(self, value: Any, fact: Fact | None) -> Any:
        if not isinstance(value, Tracked):
            return value
        return self.enter_loop(value) if fact is not None else self.whole(value)

    def remat(self, eqn: Any, fn: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
        if eqn.params["differentiated"]:  # a gradient inside the loss
            return _compat.rebind_remat(eqn, fn, args)
        prevent_cse = eqn.params["prevent_cse"]
        keep = prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse)
        return jax.checkpoint(fn, prevent_cse=keep, policy=eqn.params["policy"])(*args)


def _reduced_first(parts: Sequence[Any]) -> Sequence[Any]:
    """The operands of the program's last use: its weight's gradient is reduced before the backward pass goes on to what came
    earlier, which else runs beside the whole of it. For heads with a derivative of their own, which are there for memory's
    sake; a plain head's reduction hides behind the layers' backward pass.
    """
    if not any(isinstance(part, Parts) and part.trains for part in parts):
        return parts
    leaves, treedef = jax.tree.flatten(parts)
    is_here = lambda leaf: hasattr(leaf, "aval") and jax.typeof(leaf).memory_space != Space.Host  # of others, the squares
    takes_part = [is_here(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    tied = iter(_backward_together(*(leaf for leaf, takes in zip(leaves, takes_part, strict=True) if takes)))
    return treedef.unflatten([next(tied) if takes else leaf for leaf, takes in zip(leaves, takes_part, strict=True)])


@jax.custom_vjp
def _backward_together(*values: jax.Array) -> tuple[jax.Array, ...]:
    """`values`, none of whose cotangents is there before all are."""
    return values


_backward_together.defvjp(lambda *values: (values, None), lambda _, cotangents: tuple(jax.lax.optimization_barrier(cotangents)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _into_sink(reduction: Callable[[jax.Array], jax.Array], value: jax.Array, sink: jax.Array) -> jax.Array:
    """`value`, whose cotangent is reduced into `sink`."""
    return value


def _into_sink_forward(reduction: Any, value: jax.Array, sink: jax.Array) -> tuple[jax.Array, None]:
    return value, None


def _into_sink_backward(reduction: Any, _: None, cotangent: jax.Array) -> tuple[None, jax.Array]:
    return None, reduction(cotangent).astype(cotangent.dtype)


_into_sink.defvjp(_into_sink_forward, _into_sink_backward)


@jax.custom_vjp
def _into_virtual(value: jax.Array, virtual: jax.Array) -> jax.Array:
    """`value`, whose cotangent goes to `virtual` as it is."""
    return value


_into_virtual.defvjp(lambda value, virtual: (value, None), lambda _, cotangent: (None, cotangent))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _virtual(reduction: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], sink: jax.Array) -> jax.Array:
    """A whole-shaped stand-in of which only the cotangent matters; its zeros are never read, so never made."""
    return jnp.zeros(shape, sink.dtype)


def _virtual_forward(reduction: Any, shape: tuple[int, ...], sink: jax.Array) -> tuple[jax.Array, None]:
    return jnp.zeros(shape, sink.dtype), None


def _virtual_backward(reduction: Any, shape: tuple[int, ...], _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    return (reduction(cotangent).astype(cotangent.dtype),)


_virtual.defvjp(_virtual_forward, _virtual_backward)


def differentiable(
    jaxpr: Any, facts: Facts, args: Sequence[Any], *, reading: Reading, comm: Comm, reduce_dtype: Any
) -> list[Any]:
    """Run a loss's jaxpr, where inputs with a fact are `Parts`; differentiate the result with respect to their sinks."""
    strategy = Differentiable(reading, comm, reduce_dtype, kept_use(list(reading.uses(jaxpr, facts))))
    values = [Tracked(fact, arg) if fact is not None else arg for fact, arg in zip(facts, args, strict=True)]
    out = run(strategy, jaxpr, strategy.enter_body(jaxpr, values), Level())
    return [strategy.whole(value) if isinstance(value, Tracked) else value for value in out]
