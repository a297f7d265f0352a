"""What the makers say of each accelerator, per JAX device, with the source of every number. Memory is `topology_specs`'s.

All bandwidths are bytes per second in the direction that a ring collective uses: of B bytes gathered, B (N-1)/N pass.
"""

from typing import NamedTuple

from jzero import topology_specs as specs
from jzero.topology import Target

# What plain matrix products reach of the peak: 798 of 989 TFLOP/s on an H100, 788 on an H200 (bf16, 8192^3, jzero's own
# measurements, docs/plan.md). The other devices have not been measured here and are given the same.
MATMUL_FRACTION = 0.8
# And wires: NCCL's all-gather on 8 H100s reaches 360 to 390 of 450 GB/s (How to Scale Your Model, chapter 12, 2025).
WIRE_FRACTION = 0.8

_BOOK = "How to Scale Your Model (Austin et al., 2025), chapters 1 and 2"
_CLOUD = "cloud.google.com/tpu/docs, system architecture pages"


class Facts(NamedTuple):
    """One accelerator. `peak` is dense FLOP/s; float32 is what the matrix unit does with float32 inputs by default."""

    peak: dict[str, float]  # compute dtype -> FLOP/s
    memory_bandwidth: float
    link: float  # TPU: one ICI link, both directions; GPU: NVLink, one direction
    network: float  # between hosts (GPU) or slices (TPU), per device, one direction
    source: dict[str, str]  # field -> where it is from


def _tpu(bf16: float, memory: float, link: float, network: float, *, cores: int = 1, pages: str = _CLOUD) -> Facts:
    """`cores`: JAX devices that share a chip's figures. Float32 matmuls run as one bf16 pass by default."""
    peak = {"bfloat16": bf16 / cores, "float16": bf16 / cores, "float32": bf16 / cores}
    source = {
        "peak": f"{pages}; float32: jax's default matmul precision on TPU is one bf16 pass",
        "memory_bandwidth": pages,
        "link": _BOOK,
        "network": f"{_BOOK}: data-centre network per chip",
    }
    return Facts(peak, memory / cores, link / cores, network / cores, source)


def _gpu(bf16: float, tf32: float, memory: float, link: float, network: float, sheet: str, nic: str) -> Facts:
    peak = {"bfloat16": bf16, "float16": bf16, "float32": tf32}
    source = {
        "peak": f"NVIDIA {sheet} data sheet, dense; float32 as TF32, jax's default on GPU",
        "memory_bandwidth": "openxla/xla, xla/backends/gpu/target_config/specs",
        "link": f"NVIDIA {sheet} data sheet: half of the total NVLink bandwidth",
        "network": nic,
    }
    return Facts(peak, memory, link, network, source)


def _memory_bandwidth(model: str) -> float:
    return float(specs.GPUS[model].memory_bandwidth)


_DGX_A100 = "DGX A100: one 200 Gb/s InfiniBand port per GPU"
_DGX_H100 = "DGX H100 and H200, a3-mega, p5: 400 Gb/s per GPU"
_DGX_B200 = "DGX B200: one 400 Gb/s port per GPU"

FACTS: dict[str, Facts] = {
    "v4": _tpu(275e12, 1228e9, 90e9, 6.25e9),
    "v5e": _tpu(197e12, 819e9, 90e9, 3.125e9),
    "v5p": _tpu(459e12, 2765e9, 180e9, 6.25e9),
    "v6e": _tpu(918e12, 1640e9, 180e9, 12.5e9),
    "tpu7x": _tpu(2307e12, 7380e9, 180e9, 12.5e9, cores=2),
    "a100-40": _gpu(312e12, 156e12, _memory_bandwidth("a100-40"), 300e9, 25e9, "A100", _DGX_A100),
    "a100-80": _gpu(312e12, 156e12, _memory_bandwidth("a100-80"), 300e9, 25e9, "A100", _DGX_A100),
    "h100": _gpu(989.4e12, 494.7e12, _memory_bandwidth("h100"), 450e9, 50e9, "H100", _DGX_H100),
    "h200": _gpu(989.4e12, 494.7e12, _memory_bandwidth("h200"), 450e9, 50e9, "H200", _DGX_H100),
    "b200": _gpu(2250e12, 1125e12, _memory_bandwidth("b200"), 900e9, 50e9, "DGX B200", _DGX_B200),
    "gb200": _gpu(2500e12, 1250e12, _memory_bandwidth("gb200"), 900e9, 50e9, "GB200 NVL72", _DGX_B200),
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
