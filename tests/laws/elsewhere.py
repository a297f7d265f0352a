"""How far a step whose state rests elsewhere may be from the same step on the device; and where its state is to rest."""

import jax
import jax.numpy as jnp
import numpy as np
from closeness import assert_same_others, on_host

from jzero._tree import is_float, named_leaves
from jzero.offload.nvme.array import DiskArray

ULPS = 2  # issue 6
ON_HOST = 1e-6  # issue 6


def assert_close(actual, expected, relative=0.0, of_norm=0.0, ulps=ULPS):
    digits = {path: jnp.finfo(leaf.dtype).nmant for path, leaf in named_leaves(expected) if is_float(leaf)}
    actual, expected = on_host(actual), on_host(expected)
    assert_same_others(actual, expected, "state")
    for path, wanted in expected.floats.items():
        largest = np.max(np.abs(wanted), initial=0)
        last_place = 2.0 ** (np.floor(np.log2(largest)) - digits[path]) if largest else np.spacing(np.float32(0))
        gap = np.max(np.abs(actual.floats[path] - wanted), initial=0)
        bound = max(ulps * last_place, relative * largest) + 2 * of_norm * largest  # moments hold squares of what was clipped
        assert gap <= bound, f"{path}: {gap / last_place} units in the last place"


def assert_at_rest(step, state):
    """Every leaf is where the step's shardings say, memory kind included; returns how many are off the device."""
    leaves, shardings = jax.tree.leaves(state), jax.tree.leaves(step.shardings(state))
    assert [leaf.sharding for leaf in leaves] == shardings
    return sum(isinstance(leaf, DiskArray) or leaf.sharding.memory_kind == "pinned_host" for leaf in leaves)
