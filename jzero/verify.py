"""`jzero.verify`: one sharded step against the same step unsharded, on the user's own state and batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jzero._errors import columns, explain
from jzero._tree import is_key, named_leaves, short
from jzero.engine import compiler
from jzero.engine.statics import split_statics
from jzero.shard import ShardedStep

Row = tuple[str, Any, Any, float]


def verify(step: ShardedStep, state: Any, *batch: Any, rtol: float | None = None) -> None:
    """Raise if one sharded step does not give what `step.fn` gives on one device.

    Both start from copies of `state`, which stays valid and is not advanced. Needs memory for the whole state on one device.

    Args:
      step: from `jzero.shard`.
      state, *batch: as for a call.
      rtol: largest relative L2 difference of a leaf. By default 1e-5 where leaves are float32 or wider, 2e-2 for 16-bit ones:
        one rounding of the sum that reductions reorder. Optimizers that normalise gradients (Adam at its first step) turn
        rounding of a gradient near zero into a visible difference: give rtol= then.

    Raises:
      ValueError: names the first leaf that differs, and the others.

    A loss that draws random numbers sees other keys on each shard (the key is folded with the shard), so it differs by design.

    Example:
      >>> import jax.numpy as jnp, optax, jzero
      >>> train_step = jzero.make_train_step(lambda w, x: jnp.mean((x @ w) ** 2), optax.sgd(0.1))
      >>> step = jzero.shard(train_step, stage=3)
      >>> state = step.place(train_step.init(jnp.ones((64, 32))))
      >>> verify(step, state, jnp.ones((8, 64)))
    """
    arrays, statics = split_statics(state)
    alone, rows = jax.tree.map(_uncommitted, (arrays, batch))
    expected, _ = jax.jit(step.unsharded(statics), compiler_options=compiler.options(step.mesh))(alone, *rows)
    actual, _ = step(step.place(state), *batch)
    different = _compare(split_statics(actual)[0], split_statics(expected)[0], rtol)
    if different:
        table = columns(
            [
                [path, short(leaf), f"relative difference {error:.2e}", f"allowed {limit:.0e}"]
                for path, leaf, limit, error in different[:20]
            ]
        )
        fix = "Set reduction='global' if examples meet in the loss; a stochastic loss differs by design; else jzero is wrong."
        context = f"mesh {dict(step.mesh.shape)}; stage {step.stage}"
        raise ValueError(
            explain("jzero.verify", f"{len(different)} leaves differ after one step", found=table, context=context, fix=fix)
        )


def _uncommitted(leaf: Any) -> Any:
    """The whole leaf on the default device, free to follow a constraint on a mesh that the step itself makes."""
    return jax.device_put(_whole(leaf), may_alias=False)


def _whole(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.wrap_key_data(_whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _compare(actual: Any, expected: Any, rtol: float | None) -> list[Row]:
    different = []
    for (path, old), new in zip(named_leaves(expected), jax.tree.leaves(actual), strict=True):
        limit = _limit(old) if rtol is None else rtol
        error = _difference(old, new)
        if not error <= limit:
            different.append((path, old, limit, error))
    return different


def _limit(leaf: Any) -> float:
    if leaf.dtype == jnp.uint8 and leaf.ndim:
        return 1e-2  # codes of 8-bit moments: where sums differ in the last bit, one may round the other way
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return 0.0 if not floating else 2e-2 if leaf.dtype.itemsize < 4 else 1e-5


def _difference(expected: Any, actual: Any) -> float:
    """Relative L2 difference. The same NaN or infinity on both sides is none, on one side it is infinite."""
    left, right = (
        _whole(jax.random.key_data(leaf) if is_key(leaf) else leaf).astype(np.float64) for leaf in (expected, actual)
    )
    differs = ~((left == right) | (np.isnan(left) & np.isnan(right)))
    if not np.isfinite([left[differs], right[differs]]).all():
        return float("inf")
    gap, size = np.linalg.norm(left[differs] - right[differs]), np.linalg.norm(left[np.isfinite(left)])
    return float(gap / size) if size else float(gap)
