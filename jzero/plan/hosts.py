"""What a host gives each of its devices: memory, the link to it and drives, with the source of every number.

Bytes and bytes per second per JAX device; a link's bandwidth is that of one direction. Where a page could be read the source
names it; where not, it says so.
"""

from typing import Any, NamedTuple

from jzero.plan import facts
from jzero.topology import Target

# Of a host's memory, what a job's arrays can have: the rest is the system's, the runtime's and the input pipeline's.
USABLE = 0.9
# Of the link's raw rate, what copies of pinned memory reach: as wires elsewhere (`facts.WIRE_FRACTION`), not measured.
LINK_FRACTION = facts.WIRE_FRACTION
# Of the memory's raw rate, what an update on the host's processors reaches: as wires too. XLA's CPU compiler was not timed on
# a machine of this kind; on two cores of a shared one docs/log.md has what it reached.
MEMORY_FRACTION = facts.WIRE_FRACTION
PINNED_LIMIT_BYTES = 64 * 2**30  # of a process that drives GPUs, unless its environment says otherwise (`jzero.offload.host`)


class Host(NamedTuple):
    """A host's share for one device."""

    devices: int  # JAX devices of one host, as they are usually sold
    memory: int
    link: int
    disk: int  # 0: no local drive that a machine of this kind always has
    disk_bandwidth: int  # reads and writes together
    memory_bandwidth: int  # reads and writes together
    source: dict[str, str]  # field -> where it is from


def _gpu(gb: int, each_way: float, drives: float, rate: float, memory_rate: float, **source: str) -> Host:
    """GB of memory, GB/s of link, TB of drives and their GB/s, GB/s of memory."""
    amounts = (gb * 10**9, int(each_way * 10**9), int(drives * 10**12), int(rate * 10**9), int(memory_rate * 10**9))
    return Host(8, *amounts, {"devices": "DGX and HGX machines have eight", **source})


def _tpu(devices: int, machine: str, memory: float, link: float, rate: float, *, pages: str) -> Host:
    """`memory` and its `rate`: of the whole machine. Hosts of TPUs have no local drive unless one is added."""
    source = {
        "devices": f"machine type {machine}",
        "memory": f"machine type {machine}, {memory / 1e9:g} GB: {pages}",
        "link": "How to Scale Your Model (Austin et al., 2025), chapter 2: PCIe, 16 GB/s per TPU, 32 from v6e on",
        "disk": "none attached unless asked for: --disk",
        "disk_bandwidth": "as disk: --disk-bandwidth",
        "memory_bandwidth": f"assumed: {rate / 1e9:g} GB/s of one or two sockets with as many cores; no page gives it",
    }
    return Host(devices, int(memory / devices), int(link), 0, 0, int(rate / devices), source)


def _sheet(what: str, machine: str) -> str:
    return f"{what} ({machine} data sheet, not verified on a page)"


_GKE = "Google Cloud, plan TPUs in GKE (from memory; the table was not read again)"
_PRICES = "Google Cloud machine types, as Cyclenerd/google-cloud-pricing-cost-calculator lists them"
_GEN5 = "PCIe Gen5 x16, 63 GB/s each way: mlcommons/inference_results_v4.1, H200-SXM-141GBx8 (504 GB/s for eight)"
_GEN4 = "PCIe Gen4 x16, 31.5 GB/s each way (the standard's figure)"
_DRIVES = "eight 3.84 TB U.2 drives for eight GPUs (data sheet of the DGX; not verified on a page)"
_RATE = (
    "one data-centre U.2 drive of that size writes 4 GB/s (data sheet, not verified on a page), which is given to "
    "reads and writes that take turns too"
)
_MLPERF = "2 TB for eight: mlcommons/inference_results_v4.1, H200-SXM-141GBx8, and v3.1, XE9680_H100_SXM_80GBx8"
_C2C = "NVLink-C2C, 450 GB/s each way for two GPUs (data sheet, not verified on a page)"
_DDR4 = "409.6 GB/s for eight: two sockets of eight channels of DDR4-3200 (data sheet, not verified on a page)"
_DDR5 = "614.4 GB/s for eight: two sockets of eight channels of DDR5-4800 (data sheet; the sum as ai-hpc.org has it)"
_DDR5_5600 = "716.8 GB/s for eight: two sockets of eight channels of DDR5-5600 (data sheet, not verified on a page)"
_LPDDR5 = "512 GB/s for two: a Grace's LPDDR5X (data sheet, not verified on a page)"
_NO_DRIVES = {"disk": "none counted", "disk_bandwidth": "none counted"}
_REST = {"disk": _DRIVES, "disk_bandwidth": _RATE}
_A100 = {"link": _GEN4, "memory_bandwidth": _DDR4, **_REST}
_HOPPER = {"memory": _MLPERF, "link": _GEN5, "memory_bandwidth": _DDR5, **_REST}
_B200 = {"link": _GEN5, "memory_bandwidth": _DDR5_5600, **_REST}
_GRACE = {"link": _C2C, "memory_bandwidth": _LPDDR5, **_NO_DRIVES}

HOSTS: dict[str, Host] = {
    "v4": _tpu(4, "ct4p-hightpu-4t", 407e9, 16e9, 409.6e9, pages=_GKE),
    "v5e": _tpu(4, "ct5lp-hightpu-4t", 192e9, 16e9, 204.8e9, pages=_PRICES),
    "v5p": _tpu(4, "ct5p-hightpu-4t", 448e9, 16e9, 614.4e9, pages=_GKE),
    "v6e": _tpu(4, "ct6e-standard-4t", 720e9, 32e9, 460.8e9, pages=_GKE),
    "tpu7x": _tpu(8, "tpu7x-standard-4t", 960e9, 16e9, 614.4e9, pages=f"{_GKE}; two JAX devices share a chip"),
    "a100-40": _gpu(128, 31.5, 1.92, 4, 51.2, memory=_sheet("1 TB for eight", "DGX A100"), **_A100),
    "a100-80": _gpu(256, 31.5, 3.84, 4, 51.2, memory=_sheet("2 TB for eight", "DGX A100"), **_A100),
    "h100": _gpu(256, 63, 3.84, 4, 76.8, **_HOPPER),
    "h200": _gpu(256, 63, 3.84, 4, 76.8, **_HOPPER),
    "b200": _gpu(256, 63, 3.84, 4, 89.6, memory=_sheet("2 TB for eight", "DGX B200"), **_B200),
    "gb200": _gpu(240, 225, 0, 0, 256, memory=_sheet("480 GB for a Grace and two GPUs", "GB200"), **_GRACE),
}


class Room(NamedTuple):
    """What one device of a job has of its host, and how fast it is reached."""

    host_bytes: int
    disk_bytes: int
    link: float
    disk_bandwidth: float
    devices: int  # of one host
    host_bandwidth: float  # of its memory, as the host's processors update


def room_of(job: Any) -> Room:
    """The device's share of the host: the target's, or what the job says of it."""
    return room_on(job.parsed, job.num_devices, job.host_memory, job.disk, job.disk_bandwidth)


def room_on(
    target: Target, num_devices: int, host_memory: int | None = None, disk: int | None = None, disk_bandwidth: int | None = None
) -> Room:
    """The same of a target; what is given is of one whole host."""
    host, is_tpu = HOSTS[target.model], facts.is_tpu(target)
    devices = min(host.devices, num_devices) if is_tpu else target.grid[1]
    share = lambda own, given: own if given is None else given // devices
    memory, rate = share(host.memory, host_memory), share(host.disk_bandwidth, disk_bandwidth)
    return Room(int(memory * USABLE), share(host.disk, disk), host.link * LINK_FRACTION, rate, devices,
                host.memory_bandwidth * MEMORY_FRACTION)  # fmt: skip
