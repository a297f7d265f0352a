"""What `jzero.shard` was asked for, checked before anything else happens."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jzero import mesh as meshes
from jzero import remat as remats
from jzero import stages
from jzero._errors import explain, suggest
from jzero.engine.layout import Options
from jzero.offload import Offload, Tier, tier
from jzero.offload.asked import DEVICE, HOST, NVME, USE, Place
from jzero.pipeline import schedules
from jzero.pipeline.model import Pipeline
from jzero.pipeline.schedule import Schedule
from jzero.step import TrainStep

WHO = "jzero.shard"
ON_INDIVISIBLE = ("replicate", "error")


def options(
    fn: Callable[..., Any], *, stage: int, mesh: Mesh | None, params: Any, rules: Any, remat: Any, offload: Any, schedule: Any,
    min_shard_elements: int, on_indivisible: Any, donate: bool, strict: bool,
) -> Options:  # fmt: skip
    """The keyword arguments of `jzero.shard` as one value, or the error that says which is wrong."""
    row = stages.get(stage)
    _check_step(fn)
    _check_offload(fn, offload, donate)
    remat = _saving(remat, offload)
    policy = remats.get(remat)
    if policy is not None and not isinstance(fn, TrainStep):
        found = [f"remat={remat!r} with a step that computes its own gradient"]
        fix = "Apply jax.checkpoint inside the loss, or use jzero.make_train_step(loss_fn, optimizer)."
        raise ValueError(explain(WHO, "remat= would have no effect", found=found, fix=fix))
    if params is not None and not callable(params):
        fix = 'Write params=lambda state: state["model"].'
        raise TypeError(explain(WHO, "params= is a function of the state", found=[f"params={params!r}"], fix=fix))
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        fix = 'Write rules=[(r"attn/kernel", PartitionSpec(None, "tensor"))].'
        raise TypeError(explain(WHO, "rules= is a list of rules", found=[f"rules={rules!r}"], fix=fix))
    if isinstance(min_shard_elements, bool) or not isinstance(min_shard_elements, int) or min_shard_elements < 0:
        found = [f"min_shard_elements={min_shard_elements!r}"]
        fix = "Leaves with fewer elements stay whole; 0 shards every leaf that divides, 1024 is the default."
        raise ValueError(explain(WHO, "min_shard_elements= is a whole number, 0 or larger", found=found, fix=fix))
    if on_indivisible not in ON_INDIVISIBLE:
        found, fix = [f"on_indivisible={on_indivisible!r}"], suggest(on_indivisible, ON_INDIVISIBLE)
        raise ValueError(explain(WHO, "on_indivisible= is 'replicate' or 'error'", found=found, fix=fix))
    mesh = meshes.make_mesh() if mesh is None else mesh
    meshes.check_mesh(mesh)
    table = _schedule(fn, mesh, schedule)
    _check_fetch(fn, offload, row, table)
    if table is not None and meshes.axis_size(mesh, "expert") > 1:
        found, fix = [f"mesh {meshes.describe(mesh)}"], "Give the axis `expert`'s devices to `data`, or leave `pipe` out."
        raise NotImplementedError(explain(WHO, "a pipeline has no axis 'expert' in this version", found=found, fix=fix))
    if table is not None and remats.is_offloading(remat):
        found = [f"remat={remat!r} on a mesh with {table.num_pipe_stages} pipe stages"]
        fix = "Offload activations without a pipeline, or save fewer: remat='full' and a schedule such as 1f1b."
        raise NotImplementedError(explain(WHO, "a pipeline saves no activations in host memory", found=found, fix=fix))
    return Options(
        row, mesh, params, tuple(rules), policy, min_shard_elements, on_indivisible, donate, strict, table, offload,
        _tiers(offload), remats.is_offloading(remat),
    )  # fmt: skip


def _check_step(fn: Any) -> None:
    if not callable(fn):
        fix = "Write jzero.shard(fn, stage=3) with fn(state, *batch) -> (state, aux)."
        raise TypeError(explain(WHO, "a step is callable", found=[f"got {type(fn).__name__}"], fix=fix))


def _check_offload(fn: Any, offload: Any, donate: Any) -> None:
    if offload is None:
        return
    if not isinstance(offload, Offload):
        found, fix = [f"offload={offload!r}"], 'Write offload=jzero.Offload(opt_state="host").'
        raise TypeError(explain(WHO, "offload= is a jzero.Offload", found=found, fix=fix))
    nvme = [name for name in ("opt_state", "params") if (place := offload.place_of(name)) and place.kind == NVME]
    if nvme and not donate:
        found, fix = [f"donate=False with {offload}"], "Leave donate= out; checkpoints keep old states."
        raise ValueError(explain(WHO, "a step writes over the files that hold the state before the last", found=found, fix=fix))
    if "params" in nvme and offload.update != DEVICE:
        found = [str(offload)]
        context = "parameters in files are brought to the device for the gradient, and their update finds them there"
        fix = "Write params='host', or leave update= out."
        problem = "the host does not update parameters that rest in files"
        raise NotImplementedError(explain(WHO, problem, found=found, context=context, fix=fix))
    if not isinstance(fn, TrainStep):
        _check_opaque(offload)


def _check_opaque(offload: Offload) -> None:
    """A step that makes its own update is cut where the optimizer's arrays enter, and begins with its parameters."""
    places = [offload.place_of(name) for name in ("opt_state", "params")]
    if offload.activations is None and offload.fetch != USE and all(place is None or place.kind == HOST for place in places):
        return
    what = "activations can be offloaded" if offload.activations else "state can rest in files"
    what = "parameters come at their uses" if offload.fetch == USE else what
    found = [f"{offload} with a step that makes its own update"]
    context = "of such a step optimizer state and parameters can rest in host memory, fetched once a step"
    fix = 'Write Offload(opt_state="host"), or let jzero make the update: jzero.make_train_step(loss_fn, optimizer).'
    raise NotImplementedError(explain(WHO, f"only a TrainStep's {what}", found=found, context=context, fix=fix))


def _check_fetch(fn: Any, offload: Offload | None, stage: stages.Stage, table: Schedule | None) -> None:
    """Parameters that come at their uses are gathered there, too; and gradients take their place."""
    if offload is None or offload.fetch != USE:
        return
    rests, adds_up = (jnp.dtype(dtype).name for dtype in (fn.policy.param, fn.policy.accumulate))
    if rests != adds_up:
        found = [f"{offload}: parameters rest in {rests}, gradients add up in {adds_up}"]
        fix = "Use precision='bf16' (float32 at rest), or leave fetch= out."
        problem = "with fetch='use' gradients have the dtype of the parameters that rest in host memory"
        raise NotImplementedError(explain(WHO, problem, found=found, fix=fix))
    found = [f"{offload} at stage {stage.number}"]
    if stage.gather != "use":
        fix = "Write stage=3, on one device too, or leave fetch= out."
        raise ValueError(explain(WHO, "only stage 3 wants parameters at their uses", found=found, fix=fix))
    if table is not None:
        found = [f"{offload} with {table.num_pipe_stages} pipe stages"]
        fix = "Leave fetch= out: a pipe stage fetches its shards when a step begins."
        raise NotImplementedError(explain(WHO, "a pipeline fetches its parameters once a step", found=found, fix=fix))


def _saving(remat: Any, offload: Offload | None) -> Any:
    """The remat policy, or its like that saves in host memory where `activations="host"` asks for it."""
    if offload is None or offload.activations is None or remats.is_offloading(remat):
        return remat
    if remat not in (None, "dots"):
        found = [f"activations={offload.activations!r} with remat={remat!r}"]
        context = "what is saved for the backward pass is the remat policy's choice, and so is where"
        fix = f"Pass remat='dots' or leave it out, or name what is saved: remat='{remats.BY_NAME}hidden'."
        raise ValueError(explain(WHO, "activations= would have no effect", found=found, context=context, fix=fix))
    return "offload_dots"


def _tiers(offload: Offload | None) -> dict[Place, Tier]:
    places = [offload.place_of(role) for role in ("opt_state", "params")] if offload is not None else []
    return {place: tier(place) for place in places if place is not None}


def _schedule(fn: Any, mesh: Mesh, schedule: Any) -> Schedule | None:
    """The schedule of a pipeline, `"1f1b"` by default; None where there is one pipe stage, and the step is the plain one."""
    is_pipeline = isinstance(fn, TrainStep) and isinstance(fn.loss_fn, Pipeline)
    if not is_pipeline:
        if schedule is not None:
            found = [f"schedule={schedule!r} with {type(fn).__name__}"]
            fix = "Write jzero.make_train_step(jzero.Pipeline(embed, layers, head), optimizer, accumulate=16)."
            raise TypeError(explain(WHO, "a schedule is for a step of a jzero.Pipeline", found=found, fix=fix))
        return None
    num_pipe_stages = meshes.axis_size(mesh, "pipe")
    if num_pipe_stages > 1 and meshes.axis_size(mesh, "sequence") > 1:
        problem = "a pipeline cannot split the sequence too: its exchanges would stand where pipe stages do different things"
        fix = "Use 'tensor' or 'data' beside 'pipe', or 'sequence' without it."
        raise NotImplementedError(explain(WHO, problem, found=[f"mesh {meshes.describe(mesh)}"], fix=fix))
    found = schedules.get("1f1b" if schedule is None else schedule, num_pipe_stages, fn.accumulate, who=WHO)
    return found if num_pipe_stages > 1 else None
