"""From the largest magnitude of a block to its scale, from values to codes and back: what the reference and both kernels run."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize.formats import Format

LEAST = np.float32(2.0**-100)  # a block with no larger magnitude is zero: its scale would leave float32's normal numbers
_INF, _NAN = np.float32(np.inf), np.float32(np.nan)


def magnitude(x: jax.Array) -> jax.Array:
    """|x|, infinite where x is not a number either: not every device's maximum keeps NaN."""
    size = jnp.abs(x)
    return jnp.where(size < _INF, size, _INF)


def scale_of(largest: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """A block's scale, and what its values are multiplied by: 0 where the block is zero or has a value that is not finite."""
    most = np.float32(min(form.top * 2.0**126, float(np.finfo(np.float32).max)))  # beyond, the factor is no normal number
    is_zero, is_bad = largest < LEAST, largest > most  # never NaN, by `magnitude`
    safe = jnp.where(is_zero | is_bad, np.float32(1), largest)
    factor = jnp.where(is_zero | is_bad, np.float32(0), np.float32(form.top) / safe)
    scale = jnp.where(is_zero, np.float32(0), safe / np.float32(form.top))
    return jnp.where(is_bad, _NAN, scale), factor


def codes_of(x: jax.Array, factor: jax.Array, form: Format, noise: jax.Array | None) -> jax.Array:
    """int32 codes; of a block whose factor is 0 all are 0, whatever x is."""
    y = jnp.where(factor > 0, x * factor, np.float32(0))
    return form.encode(y.astype(jnp.float32), noise)


def values_of(codes: jax.Array, scale: jax.Array, form: Format) -> jax.Array:
    """What codes stand for; NaN where the scale is."""
    return form.decode(codes) * scale
