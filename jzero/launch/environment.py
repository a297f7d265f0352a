"""What a process of a local job finds in its environment. `jax.distributed.initialize()` reads it; two names are ours.

jax takes the coordinator from JAX_COORDINATOR_ADDRESS, and the number of processes and the rank only from a cluster that it
knows. So a local job looks as one that `mpirun` started on this host: the same three variables, without MPI.
"""

import glob
import re
import socket
import sys
from collections.abc import Mapping

from jzero.watch import STEP_TIMEOUT

RESTART = "JZERO_RESTART"  # how many times the job was started before
COUNT_FLAG = "--xla_force_host_platform_device_count"
# NVIDIA's driver, NVIDIA under WSL, AMD's, and TPUs by either of their drivers.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def has_accelerator() -> bool:
    """Whether this machine may have one: a device file on Linux, unknown and so True elsewhere."""
    return sys.platform != "linux" or any(glob.glob(one) for one in _DEVICE_FILES)


def reserve_port() -> socket.socket:
    """A bound socket on a free port. While it stays open no other program is given the port, yet gRPC may bind it.

    Linux lets sockets of one user share a port if all set SO_REUSEPORT, as gRPC servers do; only a listening one gets
    connections.
    So there is no moment between choosing the port and using it in which another job can take it.
    """
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
    except OSError:  # IPv6 compiled in and switched off
        held.close()
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("0.0.0.0", 0))
    return held


def for_rank(
    environ: Mapping[str, str], rank: int, num_processes: int, port: int, *,
    devices: int | None, step_timeout: float | None, restart: int,
) -> dict[str, str]:  # fmt: skip
    """The environment of one rank; what the user set wins where that can be."""
    found = {"PYTHONUNBUFFERED": "1", "JAX_ENABLE_PREEMPTION_SERVICE": "1", **environ, RESTART: str(restart)}
    found |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "OMPI_MCA_orte_hnp_uri": f"1.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(num_processes),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    }
    found.pop("OMPI_VERSION", None)  # 5 and later would make jax look for mpi4py
    if step_timeout is not None:
        found[STEP_TIMEOUT] = str(step_timeout)
    if not has_accelerator():
        found.setdefault("JAX_PLATFORMS", "cpu")
    if found.get("JAX_PLATFORMS") == "cpu":
        return found | _simulated(found, devices or 1)
    return found | (
        {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(rank * devices, (rank + 1) * devices)))} if devices else {}
    )


def _simulated(environ: Mapping[str, str], devices: int) -> dict[str, str]:
    """Threads are for collectives to wait in: fewer than devices and two steps in flight deadlock (docs/log.md)."""
    flags = re.sub(rf"{COUNT_FLAG}=\S+", "", environ.get("XLA_FLAGS", "")).strip()
    return {
        "XLA_FLAGS": f"{flags} {COUNT_FLAG}={devices}".strip(),
        "PJRT_NPROC": environ.get("PJRT_NPROC", str(max(16, 2 * devices))),
    }
