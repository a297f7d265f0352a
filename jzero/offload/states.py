"""A live state moved away and back, to run something else on the device."""

from typing import Any

import jax

from jzero._tree import is_key, path_name
from jzero.offload.host import KIND, HostTier

DEVICE = "device"


def offload_states(state: Any) -> Any:
    """The state with every array of the device in pinned host memory; `state` is given up, leaf by leaf.

    Scalars and keys stay, and so does what is in host memory already. Moves each device's shards over its own link to the
    host: no collective. Waits.

    Raises:
      ValueError, NotImplementedError: too little host memory, no such memory kind; before anything moves.

    Example:
      >>> import jax.numpy as jnp
      >>> state = offload_states({"w": jnp.ones((8, 8)), "count": jnp.zeros((), int)})
      >>> state["w"].sharding.memory_kind, state["count"].sharding.memory_kind
      ('pinned_host', 'device')
      >>> reload_states(state)["w"].sharding.memory_kind
      'device'
    """
    rows = [
        (path_name(path), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if _goes(leaf)
    ]
    if rows:
        HostTier().check(rows)
    return jax.tree.map(lambda leaf: _moved(leaf, leaf.sharding.with_memory_kind(KIND)) if _goes(leaf) else leaf, state)


def reload_states(state: Any, step: Any = None) -> Any:
    """The way back; `state` is given up, leaf by leaf.

    Args:
      step: the `ShardedStep` that goes on with the state. With it each leaf returns to where the step keeps it; without, all
        of them to the device, which is not what a step with `offload=` wants: it refuses such a state.
    """
    if step is None:
        return jax.tree.map(
            lambda leaf: _moved(leaf, leaf.sharding.with_memory_kind(DEVICE)) if _is_away(leaf) else leaf, state
        )
    return jax.tree.map(lambda leaf, to: leaf if leaf.sharding == to else _moved(leaf, to), state, step.shardings(state))


def _goes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.ndim > 0 and not is_key(leaf) and leaf.sharding.memory_kind == DEVICE


def _is_away(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == KIND


def _moved(leaf: jax.Array, sharding: Any) -> jax.Array:
    copy = jax.block_until_ready(jax.device_put(leaf, sharding, may_alias=False))
    leaf.delete()
    return copy
