"""The accelerators that `jzero.topology` can describe, as data.

GPU numbers: the device descriptions that XLA keeps for its own offline compilation (openxla/xla,
`xla/backends/gpu/target_config/specs/`, read November 2026), which are what the driver reports on such a device.
TPU memory: Google's "TPU architecture" pages (cloud.google.com/tpu/docs), per JAX device.
"""

from typing import NamedTuple

GIB = 1024**3


class TpuSpec(NamedTuple):
    """One TPU generation as libtpu names it."""

    libtpu_name: str
    num_dims: int  # of the chip grid: a 2D or a 3D torus
    chip_config: str  # "megacore" joins a chip's two cores to one device, as on real v4 pods
    memory_bytes: int  # HBM per JAX device


class GpuSpec(NamedTuple):
    """One GPU model: the fields of XLA's `GpuDeviceInfoProto` that differ between models."""

    description: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    memory_bytes: int
    memory_bandwidth: int  # bytes per second
    l2_cache_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int


TPUS = {
    "v4": TpuSpec("v4", 3, "megacore", 32 * GIB),
    "v5e": TpuSpec("v5e", 2, "default", 16 * GIB),
    "v5p": TpuSpec("v5p", 3, "default", 95 * GIB),
    "v6e": TpuSpec("v6e", 2, "default", 32 * GIB),
    "tpu7x": TpuSpec("tpu7x", 3, "default", 96 * GIB),  # 192 GB a chip, two devices a chip
}
# Grids that one slice can have (docs.cloud.google.com/tpu/docs, the pages of v5e and v5p): a list, or small ones and a rule.
_PLANE = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_SPACE = "2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 such as 4x4x4, 4x4x8, 8x8x16"
GRIDS = {"v5e": _PLANE, "v6e": _PLANE, "v4": _SPACE, "v5p": _SPACE, "tpu7x": _SPACE}
ALIASES = {"7x": "tpu7x", "v7x": "tpu7x", "v5litepod": "v5e", "trillium": "v6e", "ironwood": "tpu7x"}

_HOPPER = {
    "compute_capability": (9, 0),
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_bytes": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}
_AMPERE = {
    "compute_capability": (8, 0),
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_bytes": 41943040,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
}
_BLACKWELL = {
    "compute_capability": (10, 0),
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}

GPUS = {
    "h100": GpuSpec("NVIDIA H100 80GB HBM3", memory_bytes=84942979072, memory_bandwidth=3352320000000, **_HOPPER),
    "h200": GpuSpec("NVIDIA H200 141GB HBM3e", memory_bytes=151397597184, memory_bandwidth=4800000000000, **_HOPPER),
    "a100-40": GpuSpec("NVIDIA A100-SXM4-40GB", memory_bytes=42331013120, memory_bandwidth=1555200000000, **_AMPERE),
    "a100-80": GpuSpec("NVIDIA A100-SXM4-80GB", memory_bytes=85100068864, memory_bandwidth=2039040000000, **_AMPERE),
    "b200": GpuSpec(
        "NVIDIA B200",
        core_count=148,
        clock_rate_ghz=1.965,
        l2_cache_bytes=132644864,
        memory_bytes=191514411008,
        memory_bandwidth=7672320000000,
        **_BLACKWELL,
    ),
    "gb200": GpuSpec(
        "NVIDIA GB200",
        core_count=152,
        clock_rate_ghz=2.062,
        l2_cache_bytes=135528448,
        memory_bytes=197897748480,
        memory_bandwidth=7928064000000,
        **_BLACKWELL,
    ),
}

# The same on every model above.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_DNN_VERSION, _RUNTIME_VERSION = (9, 12, 0), (13, 0, 0)


def target_config(spec: GpuSpec) -> str:
    """The model as a `GpuTargetConfigProto` in text form, as the compile-only CUDA client reads it."""
    major, minor = spec.compute_capability
    fields = _COMMON | {
        "core_count": spec.core_count,
        "fpus_per_core": spec.fpus_per_core,
        "clock_rate_ghz": spec.clock_rate_ghz,
        "device_memory_size": spec.memory_bytes,
        "memory_bandwidth": spec.memory_bandwidth,
        "l2_cache_size": spec.l2_cache_bytes,
        "shared_memory_per_core": spec.shared_memory_per_core,
        "shared_memory_per_block_optin": spec.shared_memory_per_block_optin,
    }
    info = " ".join(f"{name}: {value}" for name, value in fields.items())
    return "\n".join(
        [
            f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {_version(_DNN_VERSION)} }}",
            f"runtime_version {{ {_version(_RUNTIME_VERSION)} }}",
            f'device_description_str: "{spec.description}"',
        ]
    )


def _version(numbers: tuple[int, int, int]) -> str:
    return "major: {} minor: {} patch: {}".format(*numbers)
