"""`jzero.plan`: what a user's own step would need on devices that are not there."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jzero import audit
from jzero._errors import explain
from jzero.mesh import axis_size, describe, make_mesh
from jzero.offload.host import KIND
from jzero.offload.nvme.array import DiskArray
from jzero.pipeline import schedules
from jzero.plan import hosts, refused
from jzero.plan.result import Plan
from jzero.plan.room import Need, usable_bytes
from jzero.report import Report, human
from jzero.shard import ShardedStep, shard
from jzero.topology import memory_bytes, parse, topology

WHO = "jzero.plan"
_LIBRARIES = (str(Path(jax.__file__).parent), str(Path(__file__).resolve().parent.parent))  # jax and jzero
_WANTS_A_VALUE = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)  # fmt: skip
DEFAULT_STAGE = 3


def plan(
    step: Any, state: Any, *batch: Any, target: str, search: bool = False, stage: int | None = None, mesh: Any = None
) -> Plan:
    """What `step` would need on `target`: its exact program, compiled by the target's compiler and not run.

    Args:
      step: a `ShardedStep` (its stage, rules and remat are kept, its mesh is not), a `TrainStep` of `jzero.make_train_step`, or
        any `fn(state, *batch) -> (state, aux)`.
      state: arrays or `ShapeDtypeStruct`s, as `step` takes them; nothing is allocated.
      *batch: as the step takes it, over all devices of the target: dim 0 must divide by them.
      target: such as `"h100:2x8"` (hosts x devices) or `"v5e:4x4"`; see `jzero.topology`.
      search: compile every stage instead of one, and return the plan of the first that fits, with the table of all.
      stage: the stage to plan, if not the step's own; for a plain function 3 unless said.
      mesh: sizes of mesh axes, such as `{"replica": 2, "data": 8}`; all devices on `data` if not said.

    Returns:
      A `Plan`: bytes per device at rest and at the peak, traffic per step, findings. Its closed form is None: that
      is for jzero's models, `python -m jzero.plan --model`.

    Raises:
      ValueError: an unknown target, a mesh or batch that does not divide.
      TypeError: a step that is none, or that cannot be traced without values.
      NotImplementedError: the target's compiler is not installed; the message names the extra.

    Example:
      >>> import jax.numpy as jnp
      >>> def step(w, x):
      ...     return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), None
      >>> found = plan(step, jnp.ones((64, 64)), jnp.ones((16, 64)), target="h100:2x8")  # doctest: +SKIP
      >>> found.fits  # doctest: +SKIP
      True
    """
    devices = topology(target)
    sizes = dict(mesh) if mesh else {}
    planned = make_mesh(**sizes, devices=devices)
    if not search:
        return _plan_one(_on_mesh(step, planned, stage), state, batch, target)
    plans = [_plan_one(_on_mesh(step, planned, number), state, batch, target) for number in range(4)]
    chosen = next((one for one in plans if one.fits), min(plans, key=lambda one: one.peak_bytes))
    rows = [{"stage": one.job["stage"], "peak_bytes": one.peak_bytes, "fits": one.fits, "wire": _moved(one)} for one in plans]
    return replace(chosen, search={"rows": rows, "winner": chosen.job["stage"]})


def _on_mesh(step: Any, mesh: jax.sharding.Mesh, stage: int | None) -> ShardedStep:
    """The step on the target's mesh. Findings are wanted in the plan, so nothing is strict."""
    if not isinstance(step, ShardedStep):
        if not callable(step):
            fix = "Pass a ShardedStep, a TrainStep or fn(state, *batch) -> (state, aux)."
            raise TypeError(explain(WHO, "the step must be callable", found=[f"got {type(step).__name__}"], fix=fix))
        return shard(step, stage=DEFAULT_STAGE if stage is None else stage, mesh=mesh, strict=False)
    kept = step.options
    return shard(
        step.fn, stage=kept.stage.number if stage is None else stage, mesh=mesh, params=kept.params, rules=kept.rules,
        remat=kept.remat, offload=_of_state(kept.offload), min_shard_elements=kept.min_shard_elements,
        on_indivisible=kept.on_indivisible, donate=kept.donate, strict=False,
        schedule=schedules.for_stages(kept.schedule, axis_size(mesh, "pipe")),
    )  # fmt: skip


def _of_state(offload: Any) -> Any:
    """What rests off the device; that activations do is in the remat policy already."""
    if offload is None or (offload.opt_state is None and offload.params is None):
        return None
    return replace(offload, activations=None)


def _plan_one(step: ShardedStep, state: Any, batch: tuple[Any, ...], target: str) -> Plan:
    shapes = abstract(batch)
    try:
        found = figures_of(step, abstract(state), shapes)
    except _WANTS_A_VALUE as error:
        line = f"{_where(error)}: {str(error).splitlines()[0]}"
        fix = "Decide it outside the step, or with jnp.where, lax.cond or a static argument."
        context = f"mesh {describe(step.mesh)}; {target}"
        raise TypeError(
            explain(WHO, "the step looks at a value, which a plan has none of", found=[line], context=context, fix=fix)
        ) from error
    name = getattr(step.fn, "__name__", type(step.fn).__name__)
    job = {"step": name, "stage": step.stage, "mesh": dict(step.mesh.shape), "batch": _describe_batch(shapes)}
    return Plan(
        job=job,
        target=target,
        device_bytes=memory_bytes(target),
        usable_bytes=usable_bytes(target),
        budgets=_budgets(found, target, step.mesh.size),
        compiled=found,
    )


def _budgets(found: dict[str, Any], target: str, num_devices: int) -> dict[str, Any]:
    """What rests off the device, beside the device's share of its host."""
    at_rest, room = found.get("offload", {}).get("at_rest", {}), hosts.room_on(parse(target), num_devices)
    on_disk = found.get("offload", {}).get("file_bytes", 0)
    needs = {"host": Need(at_rest.get(KIND, 0), room.host_bytes), "disk": Need(on_disk, room.disk_bytes)}
    return {name: one.to_dict() for name, one in needs.items() if one.need}


def figures_of(step: ShardedStep, state: Any, batch: tuple[Any, ...]) -> dict[str, Any]:
    """A step's figures, compiled and not run; a program that its compiler finds too large has figures too (`refused`)."""
    try:
        return figures(step.report(state, *batch))
    except jax.errors.JaxRuntimeError as error:
        found = refused.figures(str(error), _resting_bytes(step, state))
        if found is None:
            raise
        return found


def _resting_bytes(step: ShardedStep, state: Any) -> int:
    """The state on one device."""
    leaves, places = jax.tree.leaves(state), jax.tree.leaves(step.shardings(state))
    arrays = [(leaf, place) for leaf, place in zip(leaves, places, strict=True) if hasattr(leaf, "dtype")]
    return audit.bytes_at_rest([leaf for leaf, _ in arrays], [place for _, place in arrays])


def _where(error: BaseException) -> str:
    """`train.py:41 (step)`: the user's line that the error came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name}): {frames[-1].line}" if frames else "the step"


def _is_library(file: str) -> bool:
    return any(part in file for part in _LIBRARIES) or "site-packages" in file or file.startswith("<")


def figures(report: Report) -> dict[str, Any]:
    """What a plan takes from a report."""
    found = report.to_dict()
    at_rest = {role: figure["measured"] or 0 for role, figure in found["bytes_at_rest"].items()}
    wire = {
        axis: {kind: one["measured"] for kind, one in kinds.items() if one["measured"]}
        for axis, kinds in found["wire_bytes"].items()
    }
    peak = sum(at_rest.values()) + found["temp_bytes"]  # the compilers' own peak leaves out different things on each back end
    offload = {"offload": found["offload"]} if found["offload"] else {}
    return {
        "at_rest": at_rest, "wire": wire, "temp_bytes": found["temp_bytes"], "peak_bytes": peak,
        "findings": [*_off_the_device(found["offload"]), *found["findings"]], **offload,
    }  # fmt: skip


def _off_the_device(offload: dict[str, Any]) -> list[str]:
    """What each device has elsewhere, and moves."""
    places = {memory: size for memory, size in offload.get("at_rest", {}).items() if memory != "device"}
    rests = " and ".join(f"{human(size)} rest in {memory}" for memory, size in places.items())
    if not places:
        return []
    out, back = human(offload["moved_bytes"]), human(offload["back_bytes"])
    ways = f"{out} move each way in a step" if out == back else f"{out} go to the host in a step and {back} come back"
    return [f"offload: {rests}, for each device; {ways}"]


def abstract(tree: Any) -> Any:
    """Arrays as their shapes; anything else, such as a module's functions, as it is."""
    return jax.tree.map(_shape, tree)


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # without the sharding of another mesh
    if isinstance(leaf, jax.Array | DiskArray | np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True))
    return leaf


def _describe_batch(shapes: Any) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape"))


def _moved(found: Plan) -> int:
    return sum(size for kinds in (found.compiled or {}).get("wire", {}).values() for size in kinds.values())
