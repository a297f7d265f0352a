"""Which implementation of an operation runs: a table per operation, a rule, and a record of every choice.

    with pallas_kernels.target("NVIDIA H100 80GB HBM3"), pallas_kernels.recording() as choices:
        jax.make_jaxpr(step)(state, batch)
    for choice in choices: print(choice)

`recording` sees what is traced inside it, with reasons. A function that `jax.jit` has traced before for the same target is
not traced again, so every call also stands in the program as a `jit` of a telling name: `found_in(jaxpr)` lists them all.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._errors import explain, short, suggest

_PREFIX, _BETWEEN = "pallas_kernels.", ":"
_RAN = Path(__file__).parent / "ran.json"


class Call(NamedTuple):
    """What is known when an implementation is chosen."""

    device_kind: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    options: Mapping[str, Any]
    is_local: bool = False  # arrays are surely one device's: inside shard_map, interpreted, or there is no other device
    is_nested: bool = False  # in a shard_map inside another, as `inside_another` says
    auto_axes: tuple[str, ...] = ()  # of the mesh in force, over which the partitioner may split them even so

    @property
    def is_gpu(self) -> bool:
        return self.device_kind.startswith("NVIDIA")

    @property
    def is_tpu(self) -> bool:
        return self.device_kind.startswith("TPU")


class Implementation(NamedTuple):
    """One way to compute an operation. `supports(call)` is None, or why it cannot.

    A kernel of ours has a `platform`, "gpu" or "tpu", takes `interpret=`, and is only chosen where it has run (`ran.json`).
    """

    name: str
    run: Callable[..., Any]  # run(*arrays, **options)
    supports: Callable[[Call], str | None] = lambda call: None
    platform: str | None = None
    loses: Callable[[Call], str | None] = lambda call: None  # why another is better here, though it could do it

    def refuses(self, call: Call) -> str | None:
        """Why it cannot do this on this device, or None."""
        there = {"gpu": call.is_gpu, "tpu": call.is_tpu, None: True}[self.platform]
        if not there and not _said.value.is_interpreted:
            return f"it runs on a {str(self.platform).upper()}, and this is for {call.device_kind}"
        return self.supports(call)


class Choice(NamedTuple):
    """One call of an operation and what became of it. `reason` is empty in `found_in`, which reads programs."""

    op: str
    implementation: str
    reason: str
    arrays: tuple[str, ...]  # such as bfloat16[8,1024,768]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(self.arrays)}): {self.implementation}" + (f", {self.reason}" if self.reason else "")


class _Said(NamedTuple):
    """What the `with` blocks around a call say."""

    target: str | None = None
    num_devices: int | None = None
    is_disabled: bool = False
    is_interpreted: bool = False
    is_defined: bool = False
    is_nested: bool = False


_said = jax.make_user_context(_Said())  # part of the key of JAX's caches: what was traced in another block is traced anew
_records: ContextVar[tuple[list[Choice], ...]] = ContextVar("pallas_kernels_records", default=())


def target(device_kind: str, num_devices: int | None = None) -> AbstractContextManager[None]:
    """What is traced inside is for devices of this kind (`device.device_kind`); else for `jax.devices()`.

    `num_devices`: how many it runs on together. On one nothing is split, so kernels that need whole arrays may be taken.

    Example:
      >>> with target("TPU v5 lite"):
      ...     print(device_kind())
      TPU v5 lite
    """
    return _said(_said.value._replace(target=device_kind, num_devices=num_devices))


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """A list that every choice made while tracing inside is appended to. Recordings may be nested: each gets all."""
    choices: list[Choice] = []
    token = _records.set((*_records.get(), choices))
    try:
        yield choices
    finally:
        _records.reset(token)


def disabled() -> AbstractContextManager[None]:
    """What is traced inside takes the reference of every operation, unless an implementation is named: for comparisons."""
    return _said(_said.value._replace(is_disabled=True))


def interpreted() -> AbstractContextManager[None]:
    """Kernels that are named inside run on any device, interpreted: as a check of their numbers, slowly."""
    return _said(_said.value._replace(is_interpreted=True))


def inside_another() -> AbstractContextManager[None]:
    """What is traced inside stands in a `shard_map` inside another, where a compiler may not take everything."""
    return _said(_said.value._replace(is_nested=True))


def by_definition() -> AbstractContextManager[None]:
    """What is traced inside takes the reference even where an implementation is named, and is not recorded: to ask what a
    program means, which does not depend on how it is computed.
    """
    return _said(_said.value._replace(is_defined=True))


def device_kind() -> str:
    """What the program being traced is for."""
    return _said.value.target or jax.devices()[0].device_kind


def _is_local() -> bool:
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes) or _said.value.is_interpreted
    return inside or (jax.device_count() if _said.value.target is None else _said.value.num_devices) == 1


def _auto_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)


@cache
def _ran() -> frozenset[tuple[str, str, str]]:
    """(operation, implementation, device kind) of every kernel that has run on its device and equalled its reference there."""
    return frozenset((row["op"], row["implementation"], row["device_kind"]) for row in json.loads(_RAN.read_text()))


class Op:
    """An operation: its implementations in order of preference, the reference among them."""

    def __init__(self, name: str, implementations: Sequence[Implementation], *, reference: str = "reference"):
        self.name, self.table, self.reference = name, {one.name: one for one in implementations}, reference

    def __call__(self, *arrays: jax.Array, implementation: str | None = None, **options: Any) -> Any:
        """Run the chosen or named implementation on arrays; `options` are static."""
        arrays = alike(arrays)
        if _said.value.is_defined:
            return self.table[self.reference].run(*arrays, **options)
        avals = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        call = Call(device_kind(), avals, options, _is_local(), _said.value.is_nested, _auto_axes())
        chosen, reason = self.insist(implementation, call) if implementation else self.choose(call)
        choice = Choice(self.name, chosen.name, reason, tuple(map(short, avals)))
        for choices in _records.get():
            choices.append(choice)
        if chosen.platform:
            options = {**options, "interpret": _said.value.is_interpreted}
        return _named(
            chosen.run, f"{_PREFIX}{self.name}{_BETWEEN}{chosen.name}{_BETWEEN}{len(arrays)}", tuple(sorted(options.items()))
        )(*arrays)

    def would_be(self, *arrays: Any, **options: Any) -> Implementation:
        """What would be chosen for arrays of these shapes and dtypes, without a record: for callers that prepare them."""
        avals = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        return self.choose(Call(device_kind(), avals, options, _is_local()))[0]

    def insist(self, name: str, call: Call) -> tuple[Implementation, str]:
        """The implementation called `name`, or an error.

        Raises:
          ValueError: there is none of that name.
          NotImplementedError: it does not support these arrays on this device.
        """
        who = f"pallas_kernels.{self.name}"
        if name not in self.table:
            found, fix = [f"implementation={name!r}"], "Name one of them, or pass implementation=None to let it choose."
            raise ValueError(explain(who, "no such implementation", found=found, context=suggest(name, self.table), fix=fix))
        if why := self.table[name].refuses(call):
            context = f"{', '.join(map(short, call.arrays))} on {call.device_kind}"
            fix = f"implementation=None takes {self.choose(call)[0].name!r} here."
            raise NotImplementedError(
                explain(who, f"implementation {name!r} cannot do this", found=[why], context=context, fix=fix)
            )
        return self.table[name], "named by the caller"

    def choose(self, call: Call) -> tuple[Implementation, str]:
        """The first that may be used, and why those before it may not."""
        if _said.value.is_disabled:
            return self.table[self.reference], "kernels are disabled"
        refused = []
        for one in self.table.values():
            why = one.refuses(call) or one.loses(call) or (self._never_ran(one, call) if one.platform else None)
            if why is None:
                return one, "; ".join(refused) or "preferred here"
            refused.append(f"not {one.name}: {why}")
        raise AssertionError(f"{self.name} has no implementation for everything")

    def _never_ran(self, one: Implementation, call: Call) -> str | None:
        has_run = (self.name, one.name, call.device_kind) in _ran()
        return None if has_run else f"it has never run on a {call.device_kind} (name it to try)"


def varying(array: jax.Array) -> frozenset[str]:
    """The manual mesh axes that an array is typed as varying over."""
    found = getattr(jax.typeof(array), "manual_axis_type", None)
    return found.varying if found is not None else getattr(jax.typeof(array), "vma", frozenset())


def zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh axes that `like` varies over: what a loop starts with."""
    axes = tuple(sorted(varying(like)))
    none = jnp.zeros(shape, dtype)
    return jax.lax.pcast(none, axes, to="varying") if axes else none


def alike(arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Inside `shard_map` with checked types: all arrays varying over the axes that any varies over.

    A custom derivative gives every operand a gradient that varies as its result does; JAX then adds up what must be.
    """
    axes = [varying(array) for array in arrays]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return tuple(jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True))


@cache
def _named(run: Callable[..., Any], name: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`run` under `jax.jit` with a name that `found_in` reads; one object per name and options, so eager calls compile once."""
    bound = partial(run, **dict(options))

    def call(*arrays: jax.Array) -> Any:
        return bound(*arrays)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call)


def found_in(jaxpr: Any) -> list[Choice]:
    """Every call of an operation in a program, however deep, in order; reasons are only known to `recording`."""
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if "transpose(" in str(eqn.source_info.name_stack):
            continue  # the backward pass of what is listed
        name = eqn.params.get("name", "")
        if isinstance(name, str) and name.startswith(_PREFIX) and _BETWEEN in name:
            op, implementation, number = name.removeprefix(_PREFIX).split(_BETWEEN)
            arrays = tuple(short(var.aval) for var in eqn.invars[: int(number)])  # what follows, a derivative has moved there
            found += [Choice(op, implementation, "", arrays)] if len(arrays) == int(number) else []
        else:
            found += [choice for inner in _inner(eqn.params) for choice in found_in(inner)]
    return found


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one
