"""How far two pytrees of the same structure are apart, leaf by leaf."""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jzero._tree import is_key, named_leaves

LOW_PRECISION = 1.5  # times the unsharded run's own error in 16 bits; DESIGN 6


class Leaves(NamedTuple):
    """The floating-point leaves of a pytree as float64, by path, and all others as they are. 8-bit codes count as numbers."""

    floats: dict
    others: dict


def on_host(tree):
    floats, others = {}, {}
    for path, leaf in named_leaves(tree):
        dtype = jax.dtypes.result_type(leaf)
        is_float = not is_key(leaf) and (jnp.issubdtype(dtype, jnp.inexact) or dtype == jnp.uint8)
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        (floats if is_float else others)[path] = array.astype(np.float64) if is_float else array
    return Leaves(floats, others)


def gaps(left, right):
    """Per path: L2 norm of the difference. Both from `on_host`."""
    assert left.floats.keys() == right.floats.keys()
    return {path: float(np.linalg.norm(left.floats[path] - right.floats[path])) for path in left.floats}


def sizes(leaves):
    return {path: float(np.linalg.norm(leaf)) for path, leaf in leaves.floats.items()}


def assert_within(actual, expected, allowed, what):
    """Every float leaf within `allowed[path]` (L2) of what is expected, every other leaf equal."""
    found = gaps(actual, expected)
    rows = [f"{path}: {gap:.3e} > {allowed[path]:.3e}" for path, gap in found.items() if not gap <= allowed[path]]
    assert not rows, f"{what}: " + "; ".join(rows)
    assert_same_others(actual, expected, what)


def assert_same_others(actual, expected, what):
    """Counters, keys and flags are equal."""
    different = [path for path, leaf in expected.others.items() if not np.array_equal(leaf, actual.others[path])]
    assert not different, f"{what}: {different} differ"


def assert_no_worse(actual, expected, exact, group=None, least=None):
    """Errors against float32 beside the unsharded run's `expected`, leaf by leaf or, by `group(path)`, in groups of leaves.

    `least`: group -> an error that is fair whatever the unsharded run's happens to be.
    """
    group = group or (lambda path: path)
    allowed, found = collections.Counter(), collections.Counter()
    for errors, total in ((gaps(expected, exact), allowed), (gaps(actual, exact), found)):
        for path, error in errors.items():
            total[group(path)] += error**2
    limits = {name: max(LOW_PRECISION**2 * allowed[name], (least or {}).get(name, 0.0) ** 2) for name in found}
    wrong = {name: (found[name], allowed[name]) for name in found if found[name] > limits[name]}
    assert not wrong, f"squared errors against float32, sharded and unsharded: {wrong}"
