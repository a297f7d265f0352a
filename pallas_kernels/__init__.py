"""Kernels for GPUs and TPUs, one folder per operation. None has landed yet.

A folder `pallas_kernels/<op>/` will hold `reference.py` (plain jax.numpy, what the others must equal), `gpu.py`, `tpu.py`,
`shapes.py` (sizes from real models, for tests, tuning and benchmarks) and an `__init__.py` that chooses: `implementation=None`
takes the best that runs here, a name insists on it. Nothing in this package imports anything but jax.
"""
