"""Devices that are only described: the real TPU and GPU compilers on a machine that has neither.

The devices of `topology("h100:2x8")` go into a mesh and into `jit(...).lower(...).compile()` like real ones; nothing
can run on them. Needs the compiler's wheel (`pip install jzero[compile]`) and no accelerator.
"""

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jzero._errors import explain, suggest
from jzero.topology_specs import ALIASES, GPUS, GRIDS, TPUS, GpuSpec, TpuSpec, target_config

_EXAMPLES = "v5e:4x4, v5p:4x4x4, v5e:16x16*2 (two slices), h100:2x8 (hosts x devices per host)"
_TARGET = re.compile(r"(?P<model>[a-z0-9-]+):(?P<grid>\d+(?:x\d+)*)(?:\*(?P<slices>\d+))?")

# libtpu reads these once, when it is loaded. It looks for the machine it runs on and complains where there is none, and it
# lets one process at a time load it, for the sake of chips that nobody asks for here (two test workers are two processes).
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(NamedTuple):
    """A parsed target name."""

    model: str
    grid: tuple[int, ...]  # chips along each torus dim, or (hosts, devices per host)
    num_slices: int

    @property
    def spec(self) -> TpuSpec | GpuSpec:
        return (TPUS | GPUS)[self.model]


def topology(target: str) -> list[jax.Device]:
    """The devices of `target`, described and not present: they compile programs and run none.

    Args:
      target: a TPU generation and its grid of chips (`"v5e:16x16"`, `"v5p:16x16x16"`, `"tpu7x:4x4x4"`) or a GPU and
        hosts x devices per host (`"h100:2x8"`, `"a100-40:1x8"`); `*2` appended joins two slices over the data-centre
        network. `v4` has one device per chip, `tpu7x` two, as on real pods.

    Returns:
      The devices, slice by slice and host by host. Give them to `jzero.make_mesh(devices=...)` or `jax.make_mesh`.

    Sets `TPU_SKIP_MDS_QUERY`, `TPU_ACCELERATOR_TYPE`, `TPU_WORKER_HOSTNAMES` and `ALLOW_MULTIPLE_LIBTPU_LOAD` for the length
    of the call where they are not set (libtpu reads them when it loads). Set `JAX_PLATFORMS=cpu` before jax is imported, or
    jax looks for a GPU.

    Raises:
      ValueError: the target is not known or not a shape the compiler accepts.
      NotImplementedError: the compiler's wheel is missing or does not fit jax's version.

    Example:
      >>> from jzero.topology import parse
      >>> parse("v5e:16x16*2")
      Target(model='v5e', grid=(16, 16), num_slices=2)
    """
    parsed = parse(target)
    describe = _describe_tpu if parsed.model in TPUS else _describe_gpu
    return sorted(describe(target, parsed), key=_order)


def parse(target: str) -> Target:
    """The parts of a target name, or a `ValueError` that says what is known."""
    match = _TARGET.fullmatch(str(target).strip().lower())
    if match is None:
        raise ValueError(_unknown(target, "a target reads MODEL:GRID", f"For example {_EXAMPLES}."))
    model = ALIASES.get(match["model"], match["model"])
    if model not in TPUS | GPUS:
        raise ValueError(_unknown(target, f"no accelerator {match['model']!r}", suggest(match["model"], TPUS | GPUS)))
    parsed = Target(model, tuple(map(int, match["grid"].split("x"))), int(match["slices"] or 1))
    num_dims = parsed.spec.num_dims if isinstance(parsed.spec, TpuSpec) else 2
    if len(parsed.grid) != num_dims or 0 in parsed.grid or not parsed.num_slices:
        kind = f"{num_dims} sizes of its chip grid" if model in TPUS else "hosts x devices per host"
        raise ValueError(_unknown(target, f"{model} takes {kind}, none of them 0", f"For example {_EXAMPLES}."))
    return parsed


def memory_bytes(target: str) -> int:
    """HBM per device of `target`, in bytes. The compilers do not check programs against it on every back end."""
    return parse(target).spec.memory_bytes


def _order(device: Any) -> tuple[int, int, int]:
    return (getattr(device, "slice_index", None) or 0, device.process_index, device.id)


def _describe_tpu(target: str, parsed: Target) -> list[jax.Device]:
    if "TPU_LIBRARY_PATH" not in os.environ:
        _need("libtpu")
    assert isinstance(parsed.spec, TpuSpec)
    grid = "x".join(map(str, parsed.grid))
    kwargs: dict[str, Any] = {"chip_config_name": parsed.spec.chip_config}
    if parsed.num_slices > 1:
        kwargs["num_slices"] = parsed.num_slices
    with _environment(_TPU_ENVIRONMENT):
        return _devices(target, "tpu", f"{parsed.spec.libtpu_name}:{grid}", **kwargs)


def _describe_gpu(target: str, parsed: Target) -> list[jax.Device]:
    assert isinstance(parsed.spec, GpuSpec)
    _need("jax-cuda13-plugin", same_as="jaxlib")
    _need("jax-cuda13-pjrt", same_as="jaxlib")
    layout = "x".join(map(str, (parsed.num_slices, *parsed.grid)))
    return _devices(target, "cuda", parsed.model, target_config=target_config(parsed.spec), topology=layout)


def _devices(target: str, platform: str, name: str, **kwargs: Any) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **kwargs).devices)
    except NotImplementedError as error:  # the CUDA plugin was not registered
        raise NotImplementedError(_unavailable(target, str(error))) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" in reason:
            raise ValueError(_refused(target, reason)) from error
        raise NotImplementedError(_unavailable(target, reason)) from error


def _need(wheel: str, same_as: str | None = None) -> None:
    """Check that a compiler's wheel is installed, and is of the version that jax loads."""
    found = _version(wheel)
    if found is None:
        raise NotImplementedError(
            explain(
                "jzero.topology",
                f"the compiler of this target is the wheel {wheel!r}",
                found=[f"{wheel} is not installed"],
                context=_versions(),
                fix="Install it with: pip install 'jzero[compile]'",
            )
        )
    if same_as is not None and found != _version(same_as):
        raise NotImplementedError(
            explain(
                "jzero.topology",
                f"the compiler's wheel and {same_as} must be of one version",
                found=[f"{wheel} {found}", f"{same_as} {_version(same_as)}"],
                context=_versions(),
                fix=f"Install the matching one with: pip install 'jzero[compile]' {wheel}=={_version(same_as)}",
            )
        )


def _version(wheel: str) -> str | None:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> str:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
    return "; ".join(f"{name} {_version(name) or 'missing'}" for name in names)


def _unknown(target: str, expected: str, fix: str) -> str:
    return explain("jzero.topology", expected, found=[f"target={target!r}"], fix=fix)


def _refused(target: str, message: str) -> str:
    grids = GRIDS.get(parse(target).model)
    fix = f"Choose a grid that such a machine can have: {grids}." if grids else f"For example {_EXAMPLES}."
    return explain("jzero.topology", f"no such machine as {target!r}", found=[message], context=_versions(), fix=fix)


def _unavailable(target: str, message: str) -> str:
    fix = "Set JAX_PLATFORMS=cpu before jax is imported, and check that the versions belong together."
    return explain("jzero.topology", f"cannot describe {target!r} here", found=[message], context=_versions(), fix=fix)


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Environment variables for the length of a block; those that are set already win."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
