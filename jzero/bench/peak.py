"""The FLOP rate that MFU is a share of: the maker's figure for the device, or what a matmul reaches here."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one JAX device, from the makers' data sheets; parts of `device_kind`, the longer first.
_DATASHEET = {
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # two devices a chip
}


class Peak(NamedTuple):
    """FLOP/s of one device, and where the number is from."""

    flops: float
    source: str


def higher(one: Peak, other: Peak) -> Peak:
    """Of two measurements the better: other work on the machine only ever lowers one."""
    return max(one, other)


def peak(devices: list[jax.Device]) -> Peak:
    """The peak that a device's MFU is measured against."""
    device = devices[0]
    for kind, flops in _DATASHEET.items():
        if device.platform != "cpu" and kind in device.device_kind:
            return Peak(flops, f"{flops / 1e12:.0f} TFLOP/s, dense bf16 of {kind} by its data sheet")
    if device.platform == "cpu":
        sharing = jax.local_device_count()
        # Small and often: the best of many is what an undisturbed machine does, even if this one is disturbed now and then.
        rate = _matmul_rate(device, 1024, jnp.float32, num_tries=50)
        made_of = f"{rate / 1e9:.0f} GFLOP/s (fp32 matmul 1024^3, measured here on the whole machine) / {sharing} devices"
        return Peak(rate / sharing, made_of)
    rate = _matmul_rate(device, 8192, jnp.bfloat16, num_tries=5)
    return Peak(rate, f"{rate / 1e12:.0f} TFLOP/s, bf16 matmul 8192^3 measured here: {device.device_kind} is not in the table")


def _matmul_rate(device: jax.Device, size: int, dtype: jnp.dtype, *, num_tries: int) -> float:
    """The best of a few."""
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    seconds = []
    for _ in range(num_tries):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
