"""Eight CPU devices for every test, set before jax is imported anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("PJRT_NPROC", "64")  # fewer threads than devices wait for each other can deadlock: docs/log.md
NUM_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if NUM_DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NUM_DEVICES_FLAG}=8".strip()
