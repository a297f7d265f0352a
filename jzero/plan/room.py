"""How much of a device's memory a program can have."""

from jzero.topology import memory_bytes

# CUDA's context and libraries, XLA's own reserve: what a program cannot have. jax takes 75% of a GPU unless told otherwise
# (XLA_PYTHON_CLIENT_MEM_FRACTION); 95% is what it can be told. libtpu reserves a few hundred MB of each chip.
USABLE = 0.95


def usable_bytes(target: str) -> int:
    """Of the memory of one device of `target`, what a program can have."""
    return int(memory_bytes(target) * USABLE)
