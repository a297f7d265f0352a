"""What the makers say of each accelerator, per JAX device, with the source of every number. Memory is `topology_specs`'s.

All bandwidths are bytes per second in the direction that a ring collective uses: of B bytes gathered, B (N-1)/N pass.
"""

from typing import NamedTuple

from jzero import topology_specs as specs
from jzero.topology import Target

# What plain matrix products reach of the peak: 798 of 989 TFLOP/s on an H100, 788 on an H200 (bf16, 8192^3, jzero's own
# measurements, docs/plan.md). The other devices have not been measured here and are given the same.
MATMUL_FRACTION = 0.8
# And wires: all-reduce on 8 H100s comes close to 370 of 450 GB/s (How to Scale Your Model, chapter 12).
WIRE_FRACTION = 0.8

# Each number below was looked up in November 2026 on the page that is named; where none could be read, the source says so.
_BOOK = "How to Scale Your Model (Austin et al., 2025, jax-ml.github.io/scaling-book)"
_CLOUD = "docs.cloud.google.com/tpu/docs"


class Facts(NamedTuple):
    """One accelerator. `peak` is dense FLOP/s; float32 is what the matrix unit does with float32 inputs by default."""

    peak: dict[str, float]  # compute dtype -> FLOP/s
    memory_bandwidth: float
    link: float  # TPU: one ICI link, both directions; GPU: NVLink, one direction
    network: float  # between hosts (GPU) or slices (TPU), per device, one direction
    source: dict[str, str]  # field -> where it is from


def _tpu(bf16: float, memory: float, link: float, network: float, page: str, *, cores: int = 1, wide: str = "") -> Facts:
    """`cores`: JAX devices that share a chip's figures. Float32 matmuls run as one bf16 pass by default."""
    peak = {"bfloat16": bf16 / cores, "float16": bf16 / cores, "float32": bf16 / cores}
    source = {
        "peak": f"{_CLOUD}/{page}; float32: jax's default matmul precision on TPU is one bf16 pass",
        "memory_bandwidth": f"{_CLOUD}/{page}",
        "link": f"{_BOOK}, chapter 2, TPU specs: ICI bandwidth per link, both directions",
        "network": wide or f"{_CLOUD}/{page}: data center network bandwidth per chip",
    }
    return Facts(peak, memory / cores, link / cores, network / cores, source)


def _gpu(bf16: float, tf32: float, memory: float, link: float, network: float, sheet: str, nic: str) -> Facts:
    peak = {"bfloat16": bf16, "float16": bf16, "float32": tf32}
    source = {
        "peak": f"{sheet}; float32 as TF32, jax's default on GPU",
        "memory_bandwidth": "openxla/xla, xla/backends/gpu/target_config/specs",
        "link": f"{_BOOK}, chapter 12: egress per GPU inside a node, half of the total NVLink bandwidth",
        "network": nic,
    }
    return Facts(peak, memory, link, network, source)


def _memory_bandwidth(model: str) -> float:
    return float(specs.GPUS[model].memory_bandwidth)


_BOOK_DCN = f"{_BOOK}, chapter 2: data-centre network per TPU"
_A100 = f"{_BOOK}, chapter 12: 3.1e14; the third digit and TF32 are the A100 data sheet's, not verified on its page"
_HOPPER = f"{_BOOK}, chapter 12: 9.9e14; the third digit and TF32 are the H100 data sheet's, not verified on its page"
_BLACKWELL = "NVIDIA Blackwell architecture brief, dense, as glennklockwood.com/garden/processors/B200 has it"
_DGX_A100 = "DGX A100: one 200 Gb/s port per GPU (data sheet; not verified on a page)"
_DGX_H100 = f"{_BOOK}, chapter 12: 400 GB/s per node of eight on a DGX SuperPod"
_DGX_B200 = "DGX B200: one 400 Gb/s port per GPU (data sheet; not verified on a page)"

FACTS: dict[str, Facts] = {
    "v4": _tpu(275e12, 1200e9, 90e9, 6.25e9, "v4", wide=_BOOK_DCN),
    "v5e": _tpu(197e12, 819e9, 90e9, 3.125e9, "v5e", wide=f"{_CLOUD}/v5e: two 100 Gb/s ports per host of eight chips"),
    "v5p": _tpu(459e12, 2765e9, 180e9, 6.25e9, "v5p"),
    "v6e": _tpu(918e12, 1638e9, 180e9, 12.5e9, "tpu7x", wide=f"{_CLOUD}/v6e: four 200 Gb/s ports per host of eight chips"),
    "tpu7x": _tpu(2307e12, 7380e9, 180e9, 12.5e9, "tpu7x", cores=2, wide=_BOOK_DCN),
    "a100-40": _gpu(312e12, 156e12, _memory_bandwidth("a100-40"), 300e9, 25e9, _A100, _DGX_A100),
    "a100-80": _gpu(312e12, 156e12, _memory_bandwidth("a100-80"), 300e9, 25e9, _A100, _DGX_A100),
    "h100": _gpu(989.4e12, 494.7e12, _memory_bandwidth("h100"), 450e9, 50e9, _HOPPER, _DGX_H100),
    "h200": _gpu(989.4e12, 494.7e12, _memory_bandwidth("h200"), 450e9, 50e9, _HOPPER, _DGX_H100),
    "b200": _gpu(2250e12, 1100e12, _memory_bandwidth("b200"), 900e9, 50e9, _BLACKWELL, _DGX_B200),
    "gb200": _gpu(2500e12, 1250e12, _memory_bandwidth("gb200"), 900e9, 50e9, _BLACKWELL, _DGX_B200),
}

# TPUs whose torus closes only along a dim of 16 chips; the cubes of the others close along every multiple of four (same pages).
_CLOSES_AT = {"v5e": 16, "v6e": 16}


def is_tpu(target: Target) -> bool:
    return target.model in specs.TPUS


def num_devices(target: Target) -> int:
    """JAX devices of the whole target."""
    total = target.num_slices * (2 if target.model == "tpu7x" else 1)
    for size in target.grid:
        total *= size
    return total


def devices_together(target: Target) -> int:
    """Devices that the fast links join: of one slice, or of one host."""
    return num_devices(target) // target.num_slices if is_tpu(target) else target.grid[1]


def ring_bandwidth(target: Target, num_members: int, stride: int) -> float:
    """What a collective of neighbours moves per device: a group of `num_members`, `stride` devices apart in mesh order.

    TPU: the links of every dim of the torus that is used; a dim that does not close to a ring works at half. GPU: NVLink
    inside a host; beyond it, the network ports of all the host's members together, for each carries its part.
    """
    facts, together = FACTS[target.model], devices_together(target)
    span = num_members * stride
    if not is_tpu(target):
        if span <= together:
            return facts.link
        return min(facts.link, facts.network * max(1, together // stride))
    inside = facts.link * _num_rings(target, min(span, together) / together)
    return inside if span <= together else min(inside, facts.network * max(1, together // stride))


def _num_rings(target: Target, share: float) -> float:
    closes_at = _CLOSES_AT.get(target.model, 4)
    rings = sum(1.0 if size % closes_at == 0 else 0.5 for size in target.grid if size > 1)
    return max(0.5, rings * min(1.0, share * 2)) if share < 1 else max(0.5, rings)
