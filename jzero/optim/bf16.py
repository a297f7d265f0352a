"""`moments_bf16`: any optax transformation with its moments in bfloat16 between steps, rounded stochastically."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jzero._tree import is_float
from jzero.precision import round_stochastically
from pallas_kernels import rounding


class MomentsBf16State(NamedTuple):
    """The inner state with bfloat16 where float32 arrays were, and the number of updates, which the noise is drawn by."""

    inner: Any
    count: jax.Array  # int32[]


def moments_bf16(optimizer: optax.GradientTransformation, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with each float32 array of its state in bfloat16 between updates: half the bytes, and the mean is kept.

    Rounding to nearest would lose every change below 1 part in 256: at b2 = 0.999 a second moment moves by a thousandth.
    Rounded up or down with probability by distance, it moves on average by just that. The update is computed in float32.

    Args:
      optimizer: any.
      seed: of the noise, which depends on it, on the number of updates and on the leaf; not on the mesh.

    Returns:
      A transformation whose state is a `MomentsBf16State`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = moments_bf16(optax.adamw(1e-3))
      >>> tx.init({"w": jnp.zeros((2, 3))}).inner[0].nu["w"].dtype.name
      'bfloat16'

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, 2015 (stochastic rounding).
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return MomentsBf16State(
            jax.tree.map(lambda leaf: leaf.astype(_at_rest(leaf)), inner.init(params)), jnp.zeros((), jnp.int32)
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_narrow(leaf) else leaf, state.inner)
        updates, after = inner.update(updates, wide, params, **extra)
        leaves, fold = jax.tree.leaves(after), rounding.fold
        stored = [
            round_stochastically(leaf, _at_rest(leaf), fold(seed, state.count, index)) if _at_rest(leaf) != leaf.dtype else leaf
            for index, leaf in enumerate(leaves)
        ]
        return updates, MomentsBf16State(jax.tree.unflatten(jax.tree.structure(after), stored), state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_narrow(leaf: jax.Array) -> bool:
    return leaf.dtype == jnp.bfloat16 and leaf.ndim > 0


def _at_rest(leaf: jax.Array) -> Any:
    return jnp.bfloat16 if is_float(leaf) and leaf.ndim > 0 and leaf.dtype == jnp.float32 else leaf.dtype
