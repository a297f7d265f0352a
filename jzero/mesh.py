"""Meshes: named grids of devices whose axes jzero knows. Axis order, outermost first, is `MESH_AXES`."""

import difflib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jzero._errors import columns, explain, suggest
from jzero._types import BATCH_AXES, MESH_AXES


def make_mesh(
    *,
    replica: int = 1,
    data: int = -1,
    pipe: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
    **unknown: int,
) -> Mesh:
    """A mesh with Auto axes, ordered as `MESH_AXES`; axes of size 1 are left out, `data` is always in.

    Moves no data and allocates nothing. With `devices=None` the devices of this job are ordered so that inner axes are
    neighbours in the network (TPU rings, slices outermost); devices that you pass are used in the order given.

    Args:
      replica: copies of the ZeRO group (hybrid sharding): state is sharded over `data` and repeated over `replica`.
      data: the axis that ZeRO shards over. -1 takes what the other axes leave.
      pipe: pipeline stages.
      sequence: pieces of the sequence.
      tensor: pieces of each weight.
      expert: groups of experts, and one more axis for examples; ZeRO shards what is not an expert over `data` and it.
      devices: the devices to use, real ones or compile-only ones. Default: all of `jax.devices()`.

    Returns:
      A `jax.sharding.Mesh` of `len(devices)` devices.

    Raises:
      ValueError: a size that is neither positive nor -1, more than one -1, or a product that is not the number of devices.
      TypeError: an axis that jzero does not know.

    Example:
      >>> dict(make_mesh(replica=2).shape)
      {'replica': 2, 'data': 4}
    """
    if unknown:
        found = [f"{axis}={size!r}: {suggest(axis, MESH_AXES)}" for axis, size in unknown.items()]
        fix = "For axes of your own build a jax.sharding.Mesh: jzero leaves them alone."
        raise TypeError(explain("jzero.make_mesh", f"{len(unknown)} unknown axes", found=found, fix=fix))
    asked = dict(zip(MESH_AXES, (replica, data, pipe, sequence, tensor, expert), strict=True))
    chosen = jax.devices() if devices is None else list(np.asarray(devices).flat)
    sizes = _resolve(asked, len(chosen))
    kept = {axis: size for axis, size in sizes.items() if size > 1 or axis == "data"}
    shape = tuple(kept.values())
    grid = _ordered(chosen, shape) if devices is None else _as_given(chosen, shape)
    return Mesh(grid, tuple(kept), axis_types=(AxisType.Auto,) * len(kept))


def _resolve(asked: dict[str, int], num_devices: int) -> dict[str, int]:
    """The sizes with -1 filled in; raises unless they multiply to `num_devices`."""
    context = f"make_mesh({', '.join(f'{axis}={size}' for axis, size in asked.items() if size != 1)}); {num_devices} devices"
    bad = [f"{axis}={size!r}" for axis, size in asked.items() if not _is_size(size)]
    if bad:
        problem, fix = "an axis size is a positive int, or -1", "Write each size as a positive number, and at most one as -1."
        raise ValueError(explain("jzero.make_mesh", problem, found=bad, context=context, fix=fix))
    open_axes = [axis for axis, size in asked.items() if size == -1]
    product = math.prod(size for size in asked.values() if size != -1)
    if len(open_axes) > 1:
        problem = f"only one axis can take what is left, not {len(open_axes)}"
        found = [f"{axis}=-1" for axis in open_axes]
        fix = f"Give all but one of {', '.join(open_axes)} a size (data defaults to -1)."
        raise ValueError(explain("jzero.make_mesh", problem, found=found, context=context, fix=fix))
    if num_devices == 0 or num_devices % product or (not open_axes and product != num_devices):
        raise ValueError(_does_not_fit(asked, product, num_devices, context))
    return {axis: num_devices // product if size == -1 else size for axis, size in asked.items()}


def _is_size(size: object) -> bool:
    return isinstance(size, int | np.integer) and not isinstance(size, bool) and bool(size > 0 or size == -1)


def _does_not_fit(asked: dict[str, int], product: int, num_devices: int, context: str) -> str:
    sizes = [[axis, size] for axis, size in asked.items() if size != 1]
    others = math.prod(size for axis, size in asked.items() if axis != "data" and size != -1)
    problem = f"the axis sizes multiply to {product}, which does not fit {num_devices} devices"
    fix = f"Leave out one size (-1 takes what is left), or pass devices=jax.devices()[:{product}] to use some of them."
    if num_devices and num_devices % others == 0:
        fix = f"Leave data out or write data={num_devices // others}, or choose devices with devices=jax.devices()[:{product}]."
    elif product > num_devices:
        fix = f"Use sizes whose product divides {num_devices}, or start with {product} devices."
    return explain("jzero.make_mesh", problem, found=columns(sizes), context=context, fix=fix)


def _as_given(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    return grid.reshape(shape)


def _ordered(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """TPUs so that inner axes are network neighbours; elsewhere jax's own order, host by host, is that already."""
    if devices[0].platform != "tpu":
        return _as_given(devices, shape)
    outer = _over_slices(shape, len({getattr(device, "slice_index", 0) for device in devices}))
    try:
        if outer is None:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        inner = tuple(size // num_slices for size, num_slices in zip(shape, outer, strict=True))
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:  # e.g. two devices on each chip
        warnings.warn(f"jzero.make_mesh: devices in plain order, for jax cannot order them by topology: {error}", stacklevel=3)
        return _as_given(devices, shape)


def _over_slices(shape: tuple[int, ...], num_slices: int) -> tuple[int, ...] | None:
    """How many slices each axis spans, outermost first, for slices talk over a slower network; None for a single slice."""
    if num_slices == 1:
        return None
    spans, left = [], num_slices
    for size in shape:
        spans.append(math.gcd(size, left))
        left //= spans[-1]
    return tuple(spans)


def check_mesh(mesh: Mesh) -> None:
    """Raise a five-part error unless `mesh` has a `data` axis, no misspelt axis and only Auto axes.

    Axes with names of your own are allowed (your `rules=` may use them; jzero leaves them alone); a name that is nearly one of
    jzero's is taken for a slip.
    """
    if not isinstance(mesh, Mesh):
        fix = "Build one with jzero.make_mesh(data=-1)."
        raise TypeError(explain("jzero.shard", "mesh= takes a jax.sharding.Mesh", found=[f"mesh={mesh!r}"], fix=fix))
    unknown = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    slips = [axis for axis in unknown if difflib.get_close_matches(str(axis), MESH_AXES, n=1)]
    if slips or "data" not in mesh.axis_names:
        raise ValueError(_bad_names(mesh, slips or unknown))
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(_bad_types(mesh))


def _bad_names(mesh: Mesh, unknown: Sequence[str]) -> str:
    has_data = "data" in mesh.axis_names
    problem = "the mesh has an unknown axis" if has_data else "the mesh has no 'data' axis, which ZeRO shards over"
    found = [f"{axis!r}: {suggest(axis, MESH_AXES)}" for axis in unknown]
    fix = f"Build the mesh with jzero.make_mesh(data={mesh.size}), or rename its axes."
    return explain("jzero.shard", problem, found=found, context=f"mesh {describe(mesh)}", fix=fix)


def _bad_types(mesh: Mesh) -> str:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = [f"{axis!r} is {kind.name}" for axis, kind in kinds.items() if kind != AxisType.Auto]
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    auto = ", ".join(["jax.sharding.AxisType.Auto"] * len(kinds))
    fix = (
        f"Write jzero.make_mesh({sizes}), or\n"
        f"jax.make_mesh({mesh.axis_sizes}, {mesh.axis_names}, axis_types=({auto},)), for its default is Explicit."
    )
    problem = "every mesh axis must be Auto: ordinary model code does not type-check under Explicit axes"
    return explain("jzero.shard", problem, found=found, context=f"mesh {describe(mesh)}", fix=fix)


def parse(text: str, *, who: str) -> dict[str, int]:
    """Axis sizes as a command line has them: `"data=4,replica=2"` -> {"data": 4, "replica": 2}. Names are not checked.

    Raises:
      ValueError: no axis=size, or a size that is not positive; `who` is the command that was given it.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    wrong = [f"--mesh {text}: {''.join(pair)!r}" for pair in pairs if not pair[2].strip().isdigit() or int(pair[2]) < 1]
    if wrong:
        fix = "Write --mesh data=4,replica=2."
        raise ValueError(explain(who, "a mesh is axis=size, comma-separated, sizes positive", found=wrong, fix=fix))
    return {axis.strip(): int(size) for axis, _, size in pairs}


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that examples are split over: those of `replica`, `data` and `expert` that the mesh has."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def axis_size(mesh: Mesh, names: str | Iterable[str]) -> int:
    """Product of the named axes' sizes; an axis that the mesh leaves out has size 1."""
    return math.prod(mesh.shape.get(name, 1) for name in ([names] if isinstance(names, str) else names))


def describe(mesh: Mesh) -> str:
    """`{'data': 8}`, as error messages and reports print a mesh."""
    return str(dict(mesh.shape))
