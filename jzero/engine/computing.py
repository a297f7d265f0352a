"""Where the update of what is offloaded is computed: on the device, or by the processors of the host beside it.

On the device moments and masters come and go. On the host they stay: gradients leave the device, and parameters that rest there
leave and come back. The processors beside a device have its pieces alone, so a leaf that is split over devices can be updated
there if its update needs no collective: if it is elementwise, found by tracing. A leaf that is whole on its devices can always.

`update="auto"` compares seconds: what moves over the link, as measured, and what the processors read and write, as measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jzero import _compat
from jzero._errors import columns, explain
from jzero._tree import num_bytes, short
from jzero.mesh import describe
from jzero.offload import buckets as packing
from jzero.offload.asked import AUTO, DEVICE, HOST, WHO
from jzero.offload.buckets import Bucket
from jzero.offload.elementwise import BY_PLACE, first, is_for_the_device, obstacles
from jzero.offload.places import bytes_on_one_device


@dataclass(frozen=True, eq=False)
class Computed:
    """What was decided and why, for the report."""

    asked: str = DEVICE
    findings: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # of "auto": rates per device, and seconds a step both ways

    def to_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, **self.figures}


class Load(NamedTuple):
    """Bytes of one device, of a group of leaves that are updated together."""

    moved: int  # rests off the device; to the device and back, where that computes
    beside: int  # rests on the device: to the host and back, where that computes
    grads: int
    in_turns: bool = False  # slices that come and go inside one program, one way at a time
    grads_there: int = 0  # of `grads`, what is in host memory already

    def seconds_on_device(self, link: float) -> float:
        """One way is waited for where the next bucket comes while the last one goes."""
        return ((2 if self.in_turns else 1) * self.moved + self.grads_there) / link

    def seconds_on_host(self, link: float, rate: float) -> float:
        """Gradients and what rests on the device over the link; old leaves and gradients are read, new leaves written."""
        leaving = self.grads - self.grads_there
        return (leaving + 2 * self.beside) / link + (2 * (self.moved + self.beside) + self.grads) / rate

    @property
    def held(self) -> int:
        """A bucket's bytes, where the host computes: of what rests there, or what is on the device on its way (gradients,
        parameters as they leave and as they come back), which is in temporaries.
        """
        return max(self.moved, self.grads - self.grads_there + 2 * self.beside)

    @property
    def out(self) -> int:
        """From the device, where the host computes. What comes back is `beside`."""
        return self.grads - self.grads_there + self.beside

    @property
    def into(self) -> int:
        """To the device, where that computes. What goes back is `moved`."""
        return self.moved + self.grads_there


def load_of(plan: Any, group: Bucket) -> Load:
    """`plan`: an `offloaded.Update`."""
    layout = plan.layout
    size = lambda index: bytes_on_one_device(layout.placements[index].leaf, layout.on_device[index])
    members = (*group.params, *group.opt_state)
    moved, still = ([index for index in members if (layout.places[index] is None) == yes] for yes in (False, True))
    on_one = lambda index, aval: jax.ShapeDtypeStruct(layout.on_device[index].shard_shape(aval.shape), aval.dtype)
    grads = [(index, num_bytes(on_one(index, aval))) for index, aval in plan.grads if index in members]
    there = sum(size for index, size in grads if index in plan.at_use)
    in_turns = group.moved_bytes > plan.bucket_bytes and {layout.places[index].kind for index in moved} == {HOST}
    return Load(sum(map(size, moved)), sum(map(size, still)), sum(size for _, size in grads), in_turns, there)


def reasons(plan: Any, groups: Sequence[Bucket], asked: str) -> list[str | None]:
    """For each group why the host cannot update it, or None.

    Args:
      plan: the traced update, an `offloaded.Update` without buckets.

    Raises:
      ValueError: `update="host"` and leaves that the host cannot update: all of them, with the operation.
    """
    if asked == DEVICE:
        return [None] * len(groups)
    found = _reasons(plan, groups)
    if asked == HOST:
        _check(plan, groups, found)
    return found


def choose(
    plan: Any, groups: Sequence[Bucket], found: Sequence[str | None], asked: str
) -> tuple[list[Bucket], Computed]:  # fmt: skip
    """The groups, each with where it is updated; `found`: `reasons`. What rests on the device altogether is updated there."""
    if asked == DEVICE:
        return list(groups), Computed()
    if not _shows_memories(plan.layout.mesh):
        why = "this compiler does not tell memories apart without the device: the update is compiled for the device"
        return list(groups), Computed(asked, [f"update={asked!r}: {why}"])
    if asked == HOST:
        return [_by_host(plan, group) if group.moved_bytes else group for group in groups], Computed(asked)
    return _by_time(plan, groups, found)


def _by_time(plan: Any, groups: Sequence[Bucket], found: Sequence[str | None]) -> tuple[list[Bucket], Computed]:
    link, rate, why = _rates(plan.layout.mesh)
    if why:
        return list(groups), Computed(AUTO, [f"update='auto' is computed on the device: {why}"])
    chosen, times = [], []
    for group, reason in zip(groups, found, strict=True):
        load = load_of(plan, group)
        on_device, on_host = load.seconds_on_device(link), load.seconds_on_host(link, rate)
        is_possible = bool(group.moved_bytes) and reason is None
        chosen.append(_by_host(plan, group) if is_possible and on_host < on_device else group)
        times += [(on_device, on_host)] if is_possible else []
    device_s, host_s = (sum(both) for both in zip(*times, strict=True)) if times else (0.0, 0.0)
    num_there = sum(len(group.params) for group in chosen if group.on_host)
    told = f"update='auto': the host computes the update of {num_there} of {len(plan.trained)} parameters; of the {len(times)} "
    told += f"that it could, a step takes {host_s:.3g} s there and {device_s:.3g} s on the device (as measured, a device: link "
    told += f"{link / 1e9:.3g} GB/s, host {rate / 1e9:.3g} GB/s)"
    left = [reason for group, reason in zip(groups, found, strict=True) if reason and group.moved_bytes]
    more = [f"update='auto': {len(left)} parameters stay with the device; of the first {left[0]}"] if left else []
    figures = {"link_bytes_per_s": link, "host_bytes_per_s": rate, "device_s": device_s, "host_s": host_s}
    return chosen, Computed(AUTO, [told, *more], figures)


def _by_host(plan: Any, group: Bucket) -> Bucket:
    return group._replace(on_host=True, moved_bytes=load_of(plan, group).held)


def _untimed(mesh: Mesh) -> str:
    """Why link and host cannot be timed, or nothing."""
    if not set(mesh.devices.flat) <= set(jax.devices()):
        return "devices that are only described cannot be timed"
    if mesh.devices.flat[0].platform == "cpu":
        return "these devices are the host's own processors"
    return "every process must choose alike, and each would measure for itself" if jax.process_count() > 1 else ""


def _rates(mesh: Mesh) -> tuple[float, float, str]:
    """Of the link and of the host's processors, bytes per second and device; or why they cannot be had."""
    if why := _untimed(mesh):
        return 0.0, 0.0, why
    try:
        return packing.measure(mesh)[1], packing.measure_host(mesh), ""
    except Exception as error:  # an experimental part of JAX, on back ends where it may never have run
        return 0.0, 0.0, f"the host could not be timed ({type(error).__name__}: {str(error).splitlines()[0][:200]})"


def _shows_memories(mesh: Mesh) -> bool:
    """The GPU compiler without a device drops memory kinds, and with them what the host was to compute."""
    return mesh.devices.flat[0].platform in ("cpu", "tpu") or set(mesh.devices.flat) <= set(jax.devices())


def _reasons(plan: Any, groups: Sequence[Bucket]) -> list[str | None]:
    """For each group why the host cannot update it, or None."""
    num_params, num_arrays, num_scalars = plan.num_outputs
    jaxpr, _ = plan.split.part([*[True] * (num_params + num_arrays), *[False] * num_scalars])
    wide, foreign = obstacles(jaxpr, BY_PLACE), first(jaxpr, is_for_the_device)
    outputs = {index: at for at, index in enumerate((*plan.trained, *plan.arrays))}

    def reason(group: Bucket) -> str | None:
        layout, members = plan.layout, (*group.params, *group.opt_state)
        pick = lambda found: next((found[outputs[index]] for index in members if found[outputs[index]] is not None), None)
        if (eqn := pick(foreign)) is not None:
            return f"{eqn.primitive.name} is not for the host's processors{_line(eqn)}"
        if all(layout.on_device[index].is_fully_replicated for index in members):
            return None
        if (eqn := pick(wide)) is not None:
            return f"{eqn.primitive.name} is not elementwise{_line(eqn)}"
        shapes = {layout.avals[index].shape: layout.on_device[index] for index in members}
        apart = [index for index in members if not _alike(layout, index, shapes[layout.avals[index].shape])]
        return f"{layout.placements[apart[0]].leaf.path} is split otherwise than the leaves it meets" if apart else None

    return [reason(group) for group in groups]


def _line(eqn: Any) -> str:
    where = _compat.where(eqn)
    return f": {where}" if where else ""


def _alike(layout: Any, index: int, sharding: Any) -> bool:
    return layout.on_device[index].is_equivalent_to(sharding, len(layout.avals[index].shape))


def _check(plan: Any, groups: Sequence[Bucket], found: Sequence[str | None]) -> None:
    layout = plan.layout
    rows = [
        [layout.placements[index].leaf.path, short(layout.avals[index]), layout.placements[index].spec, reason]
        for group, reason in zip(groups, found, strict=True)
        if reason is not None and group.moved_bytes
        for index in (*group.params, *group.opt_state)[:1]
    ]
    if not rows:
        return
    problem = f"{len(rows)} of {len(groups)} parameters' updates cannot be computed on the host"
    context = f"mesh {describe(layout.mesh)}; update='host': the processors beside a device have its pieces alone"
    fix = "Write update='auto' or 'device': these leaves are updated on the device."
    raise ValueError(explain(WHO, problem, found=columns(rows[:20]), context=context, fix=fix))


def compiled(lowered: Any, bucket: Bucket) -> Any:
    """The update program; where it is for the host and the compiler refuses it, with what to do."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not bucket.on_host:
            raise
        found = [str(error).splitlines()[0][:400]]
        problem, fix = "this compiler refuses an update on the host's processors", "Write update='device', or leave it out."
        raise NotImplementedError(explain(WHO, problem, found=found, fix=fix)) from error
