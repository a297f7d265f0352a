"""What the pass knows of each value: "this is still a shard of parameter p, split like this", and how equations keep or end it.

Pure data flow over a jaxpr: nothing is traced or emitted here. Both engines share it; `Reading.opaque` says whether the
program already contains the optimizer (then same-shape elementwise operations and reductions are the update, and stay
sharded) or is a loss that will be differentiated (then every consumer that is no view is a use).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jzero import _compat
from jzero._specs import names, without_zero
from jzero._types import ALSO_AXES
from jzero.gather.views import dims_of

Split = tuple[Any, ...]  # one entry per dim, as in a PartitionSpec: None, an axis name, or a tuple of them
Kind = Literal["plain", "view", "barrier", "elementwise", "use", "inline", "remat", "scan", "while", "cond"]


class Fact(NamedTuple):
    """This value is a shard of leaf `leaf`. `is_param`: made from parameters, so a use wants it whole."""

    leaf: int
    split: Split
    is_param: bool = True
    root: int = 0  # which input of the enclosing loop body (or program) it came from

    @property
    def is_split(self) -> bool:
        return any(entry is not None for entry in self.split)


Facts = Sequence[Fact | None]


class Transfer(NamedTuple):
    """How one equation treats its operands: an operand with a fact but none in `entering` must be whole before it."""

    kind: Kind
    entering: tuple[Fact | None, ...]
    leaving: tuple[Fact | None, ...]


class Use(NamedTuple):
    """One place where a parameter must be whole."""

    leaf: int
    eqn: Any
    operand: int
    trips: int  # how often a step of the surrounding program runs it
    level: tuple[int, ...]  # the loops around it, by identity
    in_remat: bool
    num_elements: int  # of the whole operand; where axes other than ZeRO's split it too, of the piece that one device gathers
    num_whole: int  # once the other axes that ZeRO shards over (`sequence`) are gathered as well


ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "add",
        "add_any",
        "and",
        "asin",
        "atan",
        "atan2",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "population_count",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"])
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CUSTOM_DERIVATIVES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


@dataclass(frozen=True)
class Reading:
    """How to read a program: which engine's, and on which mesh.

    `local_axes`: the axes that are manual there, so that a value is one of their shards; a fact's other axes only say where
    its pieces lie. Default: all are Auto, and every axis of a fact counts.
    """

    opaque: bool
    axis_sizes: Mapping[str, int]
    local_axes: frozenset[str] | None = None
    _memo: dict[Any, tuple[Fact | None, ...]] = field(default_factory=dict, compare=False, repr=False)
    _alive: list[Any] = field(default_factory=list, compare=False, repr=False)

    def num_shards(self, entry: Any) -> int:
        counted = [name for name in names(entry) if self.local_axes is None or name in self.local_axes]
        return math.prod(self.axis_sizes[name] for name in counted)

    def num_pieces(self, split: Split, *, apart: Sequence[str] = ()) -> int:
        """In how many pieces axes other than ZeRO's and `apart` split a value: each is gathered and reduced by itself."""
        return math.prod(self.axis_sizes[name] for entry in split for name in without_zero(entry) if name not in apart)

    def outcome(self, jaxpr: Any, facts: Facts) -> tuple[Fact | None, ...]:
        """Facts of a jaxpr's outputs, from those of its inputs."""
        key = (id(jaxpr), tuple(facts))
        if key not in self._memo:
            self._alive.append(jaxpr)  # an id is only unique while its object lives
            known: dict[Any, Fact] = {}
            for _ in self.walk(jaxpr, facts, known):
                pass
            self._memo[key] = tuple(_look(known, out) for out in _compat.open_jaxpr(jaxpr)[0].outvars)
        return self._memo[key]

    def walk(self, jaxpr: Any, facts: Facts, known: dict[Any, Fact]) -> Iterator[tuple[Any, tuple[Fact | None, ...], Transfer]]:
        """Every equation with the facts of its operands and its transfer, filling `known` (variable -> fact)."""
        jaxpr, _ = _compat.open_jaxpr(jaxpr)
        known.update((var, fact) for var, fact in zip(jaxpr.invars, facts, strict=True) if fact is not None)
        for eqn in jaxpr.eqns:
            inputs = tuple(_look(known, var) for var in eqn.invars)
            transfer = self.transfer(eqn, inputs)
            known.update((var, fact) for var, fact in zip(eqn.outvars, transfer.leaving, strict=True) if fact is not None)
            yield eqn, inputs, transfer

    def transfer(self, eqn: Any, facts: Facts) -> Transfer:
        """What `eqn` does with operands that carry `facts`."""
        name, none = eqn.primitive.name, (None,) * len(eqn.outvars)
        if not any(facts):
            return Transfer("plain", tuple(facts), none)
        if name in _NESTED:
            return _NESTED[name](self, eqn, facts)
        if name in INLINED or (self.opaque and name in CUSTOM_DERIVATIVES):
            return Transfer("inline", tuple(facts), self.outcome(inner_jaxpr(eqn), facts))
        if name == "optimization_barrier":
            return Transfer("barrier", tuple(facts), tuple(facts))
        if view := self._view(eqn, facts):
            return Transfer("view", tuple(facts), (view,) if len(eqn.outvars) == 1 else (view,) * len(eqn.outvars))
        if self.opaque and name in ELEMENTWISE and (joined := _joined(eqn, facts)):
            return Transfer("elementwise", tuple(facts), (joined,))
        if self.opaque and name in REDUCTIONS:
            return Transfer("plain", tuple(facts), none)
        return Transfer("use", (None,) * len(eqn.invars), none)

    def _view(self, eqn: Any, facts: Facts) -> Fact | None:
        fact = facts[0]
        if fact is None or any(facts[1:]) or (dims := dims_of(eqn)) is None:
            return None
        split = tuple(None if dim is None else fact.split[dim] for dim in dims)
        if sorted(self._shards(split)) != sorted(self._shards(fact.split)):
            return None
        sizes = eqn.outvars[0].aval.shape
        divides = all(size % self.num_shards(entry) == 0 for size, entry in zip(sizes, split, strict=True))
        return fact._replace(split=split) if divides else None

    def _shards(self, split: Split) -> list[str]:
        """The entries that make a value a shard; others say where its pieces lie, and may get lost on the way."""
        return [str(entry) for entry in split if self.num_shards(entry) > 1]

    def uses(
        self, jaxpr: Any, facts: Facts, *, trips: int = 1, level: tuple[int, ...] = (), in_remat: bool = False
    ) -> Iterator[Use]:  # fmt: skip
        """Every use of every parameter, loops and nested programs included."""
        for eqn, inputs, transfer in self.walk(jaxpr, facts, {}):
            for operand, (fact, enters) in enumerate(zip(inputs, transfer.entering, strict=True)):
                if fact is not None and enters is None and fact.is_param:
                    size = math.prod(eqn.invars[operand].aval.shape)
                    piece, whole = (size // self.num_pieces(fact.split, apart=apart) for apart in ((), ALSO_AXES))
                    yield Use(fact.leaf, eqn, operand, trips, level, in_remat, piece, whole)
            if any(transfer.entering) and transfer.kind in _BODIES:
                rounds = eqn.params.get("length", 1)
                inner = (*level, id(eqn)) if transfer.kind in ("scan", "while", "cond") else level
                for body, entering in _BODIES[transfer.kind](eqn, transfer.entering):
                    remat = in_remat or transfer.kind == "remat"
                    yield from self.uses(body, entering, trips=trips * rounds, level=inner, in_remat=remat)

    def count_uses(self, jaxpr: Any, facts: Facts) -> dict[int, int]:
        """Uses per root at this level: nested calls and remat regions belong to it, loop bodies are levels of their own."""
        counts: dict[int, int] = {}
        for eqn, inputs, transfer in self.walk(jaxpr, facts, {}):
            for fact, enters in zip(inputs, transfer.entering, strict=True):
                if fact is not None and enters is None:
                    counts[fact.root] = counts.get(fact.root, 0) + 1
            if transfer.kind in ("inline", "remat"):
                for root, count in self.count_uses(inner_jaxpr(eqn), transfer.entering).items():
                    counts[root] = counts.get(root, 0) + count
        return counts


def kept_use(uses: Sequence[Use]) -> Use | None:
    """The one use whose parameter may stay whole from forward to backward: the program's last, if it stands outside loops.

    Its backward pass comes next (a language model's head), so keeping it saves a gather and costs no peak memory.
    """
    last = uses[-1] if uses else None
    return last if last is not None and not last.level and not last.in_remat else None


def inner_jaxpr(eqn: Any) -> Any:
    """The program inside a call, remat or custom-derivative equation."""
    name = INLINED.get(eqn.primitive.name) or CUSTOM_DERIVATIVES.get(eqn.primitive.name) or "jaxpr"
    return eqn.params[name]


def rooted(facts: Facts) -> tuple[Fact | None, ...]:
    """The facts as a body sees them: each input is a root of its own."""
    return tuple(fact and fact._replace(root=index) for index, fact in enumerate(facts))


def per_iteration(fact: Fact | None) -> Fact | None:
    """The fact of one slice of a scanned operand; none if the scanned dim itself is split."""
    return fact._replace(split=fact.split[1:]) if fact and fact.split[0] is None else None


def _stacked(fact: Fact | None) -> Fact | None:
    return fact and fact._replace(split=(None, *fact.split))


def _look(known: dict[Any, Fact], var: Any) -> Fact | None:
    return None if isinstance(var, _compat.Literal) else known.get(var)


def _joined(eqn: Any, facts: Facts) -> Fact | None:
    """The fact of an elementwise result: every operand has its shape or is a scalar; the first split operand decides."""
    shape = eqn.outvars[0].aval.shape
    if any(var.aval.shape not in ((), shape) for var in eqn.invars) or not shape:
        return None
    present = [fact for fact, var in zip(facts, eqn.invars, strict=True) if fact is not None and var.aval.shape == shape]
    if not present:
        return None
    leader = next((fact for fact in present if fact.is_split), present[0])
    param = next((fact for fact in present if fact.is_param), None)
    return leader._replace(leaf=param.leaf if param else leader.leaf, is_param=param is not None)


def _fixpoint(step: Callable[[Facts], Facts], carry: Facts, *, opaque: bool) -> tuple[Fact | None, ...]:
    """The carry facts that a loop body gives back. Under Auto axes any surviving fact will do: the loop's end constrains it."""

    def survives(before: Fact | None, after: Fact | None) -> Fact | None:
        if before is None or after is None or len(before.split) != len(after.split):
            return None
        return before if opaque or (before.split, before.leaf) == (after.split, after.leaf) else None

    while True:
        after = tuple(map(survives, carry, step(carry)))
        if after == tuple(carry):
            return after
        carry = after


def _scan(reading: Reading, eqn: Any, facts: Facts) -> Transfer:
    parts = _compat.scan_parts(eqn)
    consts, carry, xs = _thirds(facts, parts.num_consts, parts.num_carry)
    sliced = tuple(map(per_iteration, xs))

    def body(carry_facts: Facts) -> tuple[Fact | None, ...]:
        return reading.outcome(parts.body, rooted((*consts, *carry_facts, *sliced)))

    carry = _fixpoint(lambda c: body(c)[: parts.num_carry], carry, opaque=reading.opaque)
    entering = (*consts, *carry, *(fact if slice_ else None for fact, slice_ in zip(xs, sliced, strict=True)))
    stacked = tuple(map(_stacked, body(carry)[parts.num_carry :]))
    return Transfer("scan", entering, (*carry, *(stacked if reading.opaque else (None,) * len(stacked))))


def _while(reading: Reading, eqn: Any, facts: Facts) -> Transfer:
    if not reading.opaque:  # a collective under a predicate that differs between shards would hang
        return Transfer("use", (None,) * len(facts), (None,) * len(eqn.outvars))
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    _, consts, carry = _thirds(facts, num_cond, num_body)
    carry = _fixpoint(lambda c: reading.outcome(eqn.params["body_jaxpr"], rooted((*consts, *c))), carry, opaque=True)
    return Transfer("while", (*(None,) * num_cond, *consts, *carry), tuple(carry))


def _cond(reading: Reading, eqn: Any, facts: Facts) -> Transfer:
    if not reading.opaque:
        return Transfer("use", (None,) * len(facts), (None,) * len(eqn.outvars))
    outcomes = [reading.outcome(branch, rooted(facts[1:])) for branch in eqn.params["branches"]]
    leaving = tuple(first if all(other == first for other in rest) else None for first, *rest in zip(*outcomes, strict=True))
    return Transfer("cond", tuple(facts), leaving)


def _remat(reading: Reading, eqn: Any, facts: Facts) -> Transfer:
    return Transfer("remat", tuple(facts), reading.outcome(inner_jaxpr(eqn), facts))


def _thirds(facts: Facts, first: int, second: int) -> tuple[tuple[Fact | None, ...], ...]:
    return tuple(facts[:first]), tuple(facts[first : first + second]), tuple(facts[first + second :])


_NESTED: dict[str, Callable[[Reading, Any, Facts], Transfer]] = {
    "scan": _scan, "while": _while, "cond": _cond, "checkpoint": _remat, "remat": _remat, "remat2": _remat,
}  # fmt: skip


def _scan_bodies(eqn: Any, entering: Facts) -> list[tuple[Any, Facts]]:
    parts = _compat.scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    return [(parts.body, rooted((*entering[:start], *map(per_iteration, entering[start:]))))]


_BODIES: dict[str, Callable[[Any, Facts], list[tuple[Any, Facts]]]] = {
    "inline": lambda eqn, entering: [(inner_jaxpr(eqn), entering)],
    "remat": lambda eqn, entering: [(inner_jaxpr(eqn), entering)],
    "scan": _scan_bodies,
    "while": lambda eqn, entering: [(eqn.params["body_jaxpr"], rooted(entering[eqn.params["cond_nconsts"] :]))],
    "cond": lambda eqn, entering: [(branch, rooted(entering[1:])) for branch in eqn.params["branches"]],
}
