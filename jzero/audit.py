"""What the compiler really made of a step: bytes on the wire by mesh axis, memory, donation, and what should not be there.

Everything is per device and per step, and read from the compiled program: nothing is run, so it works for devices that are
only described.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax

from jzero import _tree, hlo
from jzero.hlo import Collective

WireTable = dict[str, dict[str, int]]  # axis -> kind -> amount

# Of the full side of a collective, what crosses one device's link with the ring algorithm: times (N - 1) / N, for a group
# of N (Patarasuk and Yuan: Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009).
_RING = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+),")
SHUFFLES = ("all-to-all", "collective-permute")


class Parameter(NamedTuple):
    """An input of the compiled program. Arguments that the step never reads are not among them."""

    name: str  # as jax names it, `state.params['w1']`; may be empty
    bytes: int
    aliased: bool  # an output is written over it: the donation worked


@dataclass(frozen=True)
class Audit:
    """One compiled program, measured. Bytes are per device, traffic is per step."""

    collectives: tuple[Collective, ...]
    wire_bytes: WireTable
    wire_elements: WireTable
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the arguments, those that outputs are written over
    temp_bytes: int
    peak_bytes: int
    host_bytes: int  # arguments, outputs and temporaries in host memory (only the TPU compiler counts them apart)
    parameters: tuple[Parameter, ...]
    module: hlo.Module

    @property
    def aliased(self) -> tuple[int, ...]:
        """The numbers of the program's parameters that outputs are written over."""
        return tuple(number for number, parameter in enumerate(self.parameters) if parameter.aliased)

    @cached_property
    def memory(self) -> hlo.Liveness:
        """The buffers of the program and their lives."""
        return hlo.liveness(self.module)


def audit(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> Audit:
    """Measure a compiled program.

    Args:
      compiled: `jax.jit(...).lower(...).compile()`, for devices that are there or only described.
      mesh: the mesh that the program was lowered for; it gives the axes their names.

    Returns:
      The measurements. CPU compilers widen bf16 collectives to f32.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
      >>> split = jax.NamedSharding(mesh, jax.P("data"))
      >>> x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)
      >>> audit(jax.jit(jnp.sum).lower(x).compile(), mesh).wire_bytes
      {'data': {'all-reduce': 6}}
    """
    module = hlo.parse(compiled.as_text() or "")
    found = hlo.collectives(module, num_devices=mesh.devices.size)
    memory = compiled.memory_analysis()
    get = lambda name: int(getattr(memory, f"{name}_in_bytes", 0))
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    resting = get("argument_size") + get("output_size") - get("alias_size")
    return Audit(
        collectives=found,
        wire_bytes=wire(found, mesh),
        wire_elements=wire(found, mesh, elements=True),
        argument_bytes=get("argument_size"),
        output_bytes=get("output_size"),
        alias_bytes=get("alias_size"),
        temp_bytes=get("temp_size"),
        peak_bytes=(0 if is_cpu else get("peak_memory")) or resting + get("temp_size"),  # the CPU's leaves temporaries out
        host_bytes=sum(get(f"host_{name}_size") for name in ("argument", "output", "temp")) - get("host_alias_size"),
        parameters=parameters(module),
        module=module,
    )


def wire(found: Iterable[Collective], mesh: jax.sharding.Mesh, *, elements: bool = False, as_meant: bool = False) -> WireTable:
    """What crosses one device's link in a step, in bytes or elements, by mesh axis and kind of collective.

    Args:
      found: the collectives. One in a loop of unknown length counts once: see `unknown_loops`.
      mesh: names the axes. A collective over several is under their names joined by `+`.
      elements: count elements, where the back end changes dtypes (CPU).
      as_meant: count an all-reduce of which every device keeps one piece as the reduce-scatter that it stands for, as
        the CPU and sometimes the TPU compiler write it, although it moves twice as much; and one of padded shards, as the TPU
        compiler writes small gathers, as the all-gather.

    Returns:
      Ring traffic: an all-gather, reduce-scatter or all-to-all of B bytes (the full side) among N moves B (N-1)/N, an
      all-reduce twice that, a permute B.
    """
    table: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for one in found:
        if hlo.group_size(one.groups) > 1:
            amount = (one.elements if elements else one.full_bytes) * (1 if one.count is None else one.count)
            kind = _counted_as(one) if as_meant else one.kind
            name = meaning(one) if as_meant else one.kind
            table[hlo.axis_of(one.groups, mesh)][name] += moved(kind, amount, hlo.group_size(one.groups))
    return {axis: dict(kinds) for axis, kinds in table.items()}


def wire_bytes(one: Collective) -> int:
    """Bytes that one collective moves over a device's link in a step, counted as meant; in an unknown loop once."""
    times = 1 if one.count is None else one.count
    return moved(_counted_as(one), one.full_bytes * times, hlo.group_size(one.groups))


def _counted_as(one: Collective) -> str:
    """An all-reduce moves what it stands for; what permutes do piece by piece, they move themselves."""
    return meaning(one) if one.kind == "all-reduce" else one.kind


def meaning(one: Collective) -> str:
    """The kind that the program asked for, where the compiler wrote another."""
    return one.meaning


def moved(kind: str, amount: int, num_members: int) -> int:
    """What one member's link carries of a collective whose full side is `amount`, with the ring algorithm."""
    return _RING[kind] * amount * (num_members - 1) // num_members if kind in _RING else amount


def parameters(module: hlo.Module) -> tuple[Parameter, ...]:
    """The program's inputs in order, each with its name, bytes per device and whether an output reuses it."""
    aliases = {int(number) for number in _ALIAS.findall(hlo.value_after(module.header, "input_output_alias") or "")}
    entry = module.computations[module.entry].instructions.values()
    inputs = {int(one.operands[0]): one for one in entry if one.opcode == "parameter"}
    return tuple(
        Parameter(one.op_name.replace("\\'", "'"), one.shape.bytes, number in aliases) for number, one in sorted(inputs.items())
    )


def shard_bytes(leaf: Any, sharding: jax.sharding.Sharding | None) -> int:
    """Bytes of `leaf` on one device under `sharding`; None is replicated."""
    shape = leaf.shape if sharding is None else sharding.shard_shape(tuple(leaf.shape))
    return _tree.num_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def bytes_at_rest(leaves: Any, shardings: Any) -> int:
    """Bytes per device of a pytree of arrays (or their shapes) that rest under a like pytree of shardings.

    Example:
      >>> mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
      >>> split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
      >>> leaf = jax.ShapeDtypeStruct((8, 2), "float32")
      >>> bytes_at_rest({"w": leaf, "b": leaf}, {"w": split, "b": whole})
      80
    """
    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, leaves, shardings)))


def shuffles(measured: Audit) -> tuple[Collective, ...]:
    """All-to-alls and permutes: no ZeRO stage needs one, so the partitioner is moving activations about.

    Left out are the permutes by which the TPU compiler gathers or scatters beside a matrix product.
    """
    return tuple(one for one in measured.collectives if one.meaning in SHUFFLES and hlo.group_size(one.groups) > 1)


def unknown_loops(measured: Audit) -> tuple[Collective, ...]:
    """Collectives inside a loop whose length is not known when compiling; the tables count them once."""
    return tuple(one for one in measured.collectives if one.count is None)


def gathered_in(measured: Audit, *dtypes: str) -> tuple[Collective, ...]:
    """Gathers of arrays with one of the HLO dtypes named, such as `"f32"` where bf16 should be on the wire."""
    return tuple(
        one for one in measured.collectives if one.kind == "all-gather" and any(array.dtype in dtypes for array in one.arrays)
    )


def in_loops(measured: Audit, *kinds: str) -> tuple[Collective, ...]:
    """Collectives of the named kinds that a loop repeats."""
    return tuple(one for one in measured.collectives if one.kind in kinds and one.loop_depth > 0)


def describe(one: Collective, mesh: jax.sharding.Mesh) -> str:
    """One collective as a line for a finding: kind, axis, arrays, times per step, and the line of code that asked for it."""
    arrays = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in one.arrays)
    times = "an unknown number of times" if one.count is None else f"{one.count} times"
    where = one.source or one.op_name or "code that the compiler wrote"
    return f"{one.kind} over {hlo.axis_of(one.groups, mesh)!r} of {arrays}, {times} a step, from {where}"
