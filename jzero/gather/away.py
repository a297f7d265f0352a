"""Parameters that rest in host memory and come where they are used, and whose gradients leave as they appear.

A shard that rests away is fetched, cast and gathered inside its use (or inside the remat region around it), so it comes again
for the backward pass and lies on the device in neither; a loop over layers fetches its own slice. The gradient of that use is
reduced, added to what earlier microbatches left in host memory, and goes back there. Its squares stay: the norm of all
gradients is wanted before any of them is read again. [ZeRO-Infinity](https://arxiv.org/abs/2104.07857), section 5, says the
same of a prefetcher and hooks; here compilers overlap the copies, which are asynchronous slices of host arrays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jzero import _compat
from jzero.comm import Comm
from jzero.gather.facts import Facts, Reading, Split, inner_jaxpr, per_iteration, rooted
from jzero.precision import sum_of_squares

Space = jax.memory.Space
NOTHING = -1.0  # in place of a sum of squares: no microbatch has left a gradient yet


class Views:
    """Equations that still act on a parameter after its loops; compared by identity, so that it is static data of a pytree."""

    def __init__(self, eqns: tuple[Any, ...] = ()):
        self.eqns = eqns


NONE_YET = Views()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["shard", "total", "squares"],
    meta_fields=["dtype", "adds", "num_loops", "split", "views"],
)
@dataclass(frozen=True)
class Away:
    """A parameter in host memory, and where its gradient goes.

    Args:
      shard: at rest, in any floating-point dtype.
      total: like `shard`; its cotangent is the gradient so far, and with `adds` its value the one that earlier microbatches
        left. None for a parameter that does not train.
      squares: float32, one element for each iteration of the loops on the way to the use; its cotangent is the sum of squares
        of `total`'s. Its value is `NOTHING` as long as that of `total` means nothing.
      dtype: what it is cast to before it is gathered.
      adds: whether this may not be the first microbatch.
      num_loops: how many loops take slices on the way to the use.
      split: how the shard lies, once `views` has equations; before that its fact says so.
    """

    shard: Any
    total: Any
    squares: Any
    dtype: Any
    adds: bool
    num_loops: int
    split: Split | None = None
    views: Views = NONE_YET

    def seen(self, eqn: Any, split: Split) -> "Away":
        """Behind one more view, which will act on the whole."""
        return replace(self, split=self.split or split, views=Views((*self.views.eqns, eqn)))

    def arrived(self, split: Split, comm: Comm, reduce_dtype: Any) -> jax.Array:
        """The whole parameter, on the device; `split`: its fact's."""
        split, squares_are_of_slices = self.split or split, self.num_loops > 0

        def gather(shard: jax.Array) -> jax.Array:
            return comm.gather(moved(shard, Space.Device).astype(self.dtype), split)

        def add(before: tuple[Any, Any], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
            total, squares = before
            grad = comm.reduce(cotangent, split, reduce_dtype).astype(total.dtype)
            if self.adds:
                here = moved(total, Space.Device)
                grad = grad + jnp.where(squares == NOTHING, jnp.zeros_like(here), here)
            own = sum_of_squares(grad, is_slice=squares_are_of_slices)
            return moved(grad, jax.typeof(total).memory_space), own

        whole = gather(self.shard) if self.total is None else _arrive(gather, add, self.shard, self.total, self.squares)
        for eqn in self.views.eqns:
            (whole,) = _compat.bind(eqn, [whole])
        return whole


def moved(value: jax.Array, space: Any) -> jax.Array:
    """`value` in that memory; where a back end drops memory kinds all is in one."""
    return value if jax.typeof(value).memory_space == space else jax.device_put(value, space)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _arrive(gather: Any, add: Any, shard: jax.Array, total: jax.Array, squares: jax.Array) -> jax.Array:
    """`gather(shard)`, whose cotangent is added to `total`."""
    return gather(shard)


def _arrive_forward(gather: Any, add: Any, shard: jax.Array, total: jax.Array, squares: jax.Array) -> tuple[Any, Any]:
    return gather(shard), (total, squares)


def _arrive_backward(gather: Any, add: Any, before: tuple[Any, Any], cotangent: jax.Array) -> tuple[None, Any, Any]:
    return None, *add(before, cotangent)


_arrive.defvjp(_arrive_forward, _arrive_backward)


@dataclass
class Found:
    """Which parameters a program uses once, in one place, and as they come."""

    loops: dict[int, tuple[int, ...]] = field(default_factory=dict)  # leaf -> lengths of the loops that slice it
    reasons: dict[int, str] = field(default_factory=dict)  # leaf -> why it cannot come at its use

    def used(self, leaf: int, eqn: Any, lengths: tuple[int, ...]) -> None:
        if leaf in self.loops:
            self.reasons.setdefault(leaf, f"is used more than once: {_compat.where(eqn)}")
        self.loops[leaf] = lengths


def comes_once(reading: Reading, jaxpr: Any, facts: Facts) -> Found:
    """The parameters with facts that can come at their use, and for the others the reason.

    One can if it is used once, and loops around that use take slices of it: what is used twice, or in every iteration, has
    gradients to add up between uses. Views on the way that make it smaller, narrower, or another shape before a loop would have
    to act in host memory.
    """
    found = Found()
    _visit(reading, jaxpr, facts, (), frozenset(), found)
    unused = {fact.leaf for fact in facts if fact is not None} - found.loops.keys()
    for leaf in unused:
        found.reasons.setdefault(leaf, "is used by nothing")
    found.loops = {leaf: lengths for leaf, lengths in found.loops.items() if leaf not in found.reasons}
    return found


def _visit(
    reading: Reading, jaxpr: Any, facts: Facts, lengths: tuple[int, ...], viewed: frozenset[int], found: Found
) -> None:  # fmt: skip
    for eqn, inputs, transfer in reading.walk(jaxpr, facts, {}):
        for operand, (fact, enters) in enumerate(zip(inputs, transfer.entering, strict=True)):
            if fact is None:
                continue
            if enters is None:
                found.used(fact.leaf, eqn, lengths)
            elif reason := _obstacle(eqn, transfer, operand, fact.leaf, fact.leaf in viewed):
                found.reasons.setdefault(fact.leaf, f"{reason}: {_compat.where(eqn)}")
        if transfer.kind == "view":
            viewed |= {fact.leaf for fact in inputs if fact is not None}
        elif transfer.kind in ("inline", "remat"):
            _visit(reading, inner_jaxpr(eqn), transfer.entering, lengths, viewed, found)
            viewed |= {fact.leaf for fact in transfer.leaving if fact is not None}
        elif transfer.kind == "scan":
            parts = _compat.scan_parts(eqn)
            start = parts.num_consts + parts.num_carry
            entering = rooted((*[None] * start, *map(per_iteration, transfer.entering[start:])))
            _visit(reading, parts.body, entering, (*lengths, parts.length), viewed, found)


def _obstacle(eqn: Any, transfer: Any, operand: int, leaf: int, is_viewed: bool) -> str:
    """Why a parameter that goes on through this equation cannot come at its use."""
    match transfer.kind:
        case "view":
            before, after = eqn.invars[operand].aval, eqn.outvars[0].aval
            same = (before.size, before.dtype, len(eqn.outvars)) == (after.size, after.dtype, 1)
            return "" if same else "is cut or cast before its use"
        case "scan":
            parts = _compat.scan_parts(eqn)
            if operand < parts.num_consts + parts.num_carry:
                return "is the same in every iteration of a loop"
            return "is turned round before its loop" if is_viewed else ""
        case "remat":
            comes_out = any(fact is not None and fact.leaf == leaf for fact in transfer.leaving)
            return "comes out of a remat region" if comes_out else ""
        case "inline" | "barrier":
            return ""
        case kind:
            return f"meets {kind}"


def findings(at_use: Sequence[str], reasons: Mapping[str, str]) -> Iterator[str]:
    """What comes at its use, and what does not and why."""
    yield f"{len(at_use)} parameters come from host memory at each use, and their gradients leave as they appear"
    for path, reason in reasons.items():
        yield f"{path} is fetched when a step begins, its gradient stays on the device: it {reason}"
