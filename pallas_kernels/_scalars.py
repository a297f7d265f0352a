"""Numbers of a fixed dtype that are constants in a kernel; `jnp.uint32(1)` would be an array that it captures."""

import jax.numpy as jnp

uint32 = jnp.dtype("uint32").type
float32 = jnp.dtype("float32").type
