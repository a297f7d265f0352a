"""What this machine has: versions, devices, memory kinds, the speed between host and device, compilers for other devices."""

import importlib.metadata
import os
import platform
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jzero.report import human
from jzero.topology import topology

PACKAGES = ("jzero", "jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
_COMPILERS = {"TPU": "v5e:2x2", "CUDA": "h100:1x1"}
_EXTRA = "pip install 'jzero[compile]'"
_TRANSFER_BYTES = 64 * 2**20
_NUM_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found. `print` it, or take `to_dict()`."""

    python: str
    versions: dict[str, str | None]  # None: not installed
    devices: list[dict[str, Any]]  # kind, platform, memory kinds, bytes where the device says
    host_to_device: float  # bytes per second
    device_to_host: float
    device_to_device: float | None  # what one device receives in an all-gather, bytes per second; None: only one device
    host_bytes: int  # memory of this machine
    lockable_bytes: int | None  # of it, what this process may lock, as registering it with network cards does; None: all
    compilers: dict[str, str]  # "works", or the reason why not
    missing: list[str]  # each with the way to get it

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `json.dumps` takes."""
        return asdict(self)

    def __str__(self) -> str:
        installed = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        between = self.device_to_device
        locked = "none" if self.lockable_bytes is None else human(self.lockable_bytes)
        kinds: dict[str, int] = {}
        for device in self.devices:
            said = f"{device['kind']} ({human(device['bytes'])}; memory kinds {', '.join(device['memory_kinds'])})"
            kinds[said] = kinds.get(said, 0) + 1
        return "\n".join(
            [
                f"Python {self.python}; {installed}",
                *(f"{number} x {said}" for said, number in kinds.items()),
                f"Host to device {human(self.host_to_device)}/s, device to host {human(self.device_to_host)}/s, measured",
                *([] if between is None else [f"Device to device {human(between)}/s received in an all-gather, measured"]),
                f"Host memory {human(self.host_bytes)}, limit of locked memory (ulimit -l): {locked}",
                *(f"Compiler for described {name} devices: {state}" for name, state in self.compilers.items()),
                *(f"Missing: {line}" for line in self.missing),
                *(() if self.missing else ("Nothing is missing.",)),
            ]
        )


def doctor() -> Diagnosis:
    """Look at this machine: versions, devices, transfers of 64 MiB (each way, and gathered), compilers that need no device.

    Returns:
      A `Diagnosis`; its `missing` says what to install.

    Example:
      >>> import jax
      >>> len(doctor().devices) == jax.local_device_count()
      True
    """
    versions = {name: _version(name) for name in PACKAGES}
    upload, download = bandwidth(jax.local_devices()[0])
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    compilers = {name: _try_compiler(target) for name, target in _COMPILERS.items()}
    return Diagnosis(
        python=platform.python_version(),
        versions=versions,
        devices=[_device(one) for one in jax.local_devices()],
        host_to_device=upload,
        device_to_host=download,
        device_to_device=between_devices(jax.local_devices()),
        host_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        lockable_bytes=None if locked == resource.RLIM_INFINITY else locked,
        compilers=compilers,
        missing=missing(versions, compilers),
    )


def bandwidth(device: jax.Device) -> tuple[float, float]:
    """Bytes per second to and from `device`, the best of a few: other work on the machine only ever lowers it."""
    rows = np.arange(_TRANSFER_BYTES // 4, dtype=np.int32)
    up, down = [], []
    for _ in range(_NUM_TRIES):
        start = time.perf_counter()
        there = jax.block_until_ready(jax.device_put(rows, device, may_alias=False))
        up.append(time.perf_counter() - start)
        start = time.perf_counter()
        np.array(there, copy=True)
        down.append(time.perf_counter() - start)
        there.delete()
    return rows.nbytes / min(up), rows.nbytes / min(down)


def between_devices(devices: list[jax.Device]) -> float | None:
    """Bytes per second that each device receives in an all-gather of 64 MiB, the best of a few."""
    if len(devices) == 1:
        return None
    mesh = jax.sharding.Mesh(np.array(devices), "data")
    split, whole = (jax.NamedSharding(mesh, jax.P(*names)) for names in (["data"], []))
    size = _TRANSFER_BYTES // 4 // len(devices) * len(devices)
    rows = jax.jit(lambda: jax.numpy.arange(size, dtype=np.int32), out_shardings=split)()
    gather = jax.jit(lambda rows: rows, out_shardings=whole).lower(rows).compile()
    seconds = []
    for _ in range(_NUM_TRIES):
        start = time.perf_counter()
        jax.block_until_ready(gather(rows))
        seconds.append(time.perf_counter() - start)
    return rows.nbytes * (len(devices) - 1) / len(devices) / min(seconds)


def missing(versions: dict[str, str | None], compilers: dict[str, str]) -> list[str]:
    """What is not there or does not fit, each with the way to get it."""
    wheels = {"TPU": ("libtpu",), "CUDA": ("jax-cuda13-plugin", "jax-cuda13-pjrt")}
    found = []
    for name, state in compilers.items():
        absent = [wheel for wheel in wheels[name] if versions.get(wheel) is None]
        if absent:
            found.append(f"{', '.join(absent)}, to plan and test for {name} devices that are not there: {_EXTRA}")
        elif state != "works":
            found.append(f"a working {name} compiler: {state}")
    return found


def _try_compiler(target: str) -> str:
    try:
        topology(target)
    except (NotImplementedError, ValueError) as error:
        return " ".join(str(error).split())
    return "works"


def _device(device: jax.Device) -> dict[str, Any]:
    statistics = device.memory_stats() or {}
    kinds = [memory.kind for memory in device.addressable_memories()]
    return {
        "kind": device.device_kind, "platform": device.platform, "memory_kinds": kinds, "bytes": statistics.get("bytes_limit")
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
