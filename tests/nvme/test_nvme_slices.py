"""Leaves larger than a bucket."""

import jax
import jax.numpy as jnp
import pytest
from swapped import by_rows

import jzero
from jzero.engine import by_slices
from jzero.offload.nvme.shard_file import part_bytes
from jzero.offload.slices import Slices


@pytest.mark.parametrize("update", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_a_leaf_larger_than_a_bucket_goes_by_rows(tmp_path, update):
    """In buckets of 2 MiB: the numbers of the whole, in a pool of slices."""
    where = f"nvme:{tmp_path}"
    offload, state = by_rows(jzero.Offload(opt_state=where, bucket_bytes=2**21, update=update))
    assert [row["slices"] for row in offload["buckets"]] == [1, 3]
    assert offload["places"][where]["pool_bytes"] == 4 * 2 * 2**20  # of four lanes, each a third of two moments of 3 MiB
    state.opt_state[0].mu["layers"].swap.verify()


@pytest.mark.parametrize(("wanted", "num"), [(1, 2), (3, 4), (4, 4), (100, 4)])
def test_rows_larger_than_a_bucket_go_one_by_one(wanted, num):
    """Four rows of 16 MiB cannot make a hundred slices: the finest cut is better than none."""
    sharding = jax.NamedSharding(jzero.make_mesh(devices=jax.devices()[:1]), jax.P())
    moments = [jax.ShapeDtypeStruct((4, 2048, 2048), jnp.float32)] * 2
    assert by_slices.rows(moments, sharding, wanted) == Slices(0, num, 4 // num)


@pytest.mark.parametrize(
    ("num_bytes", "num_rows", "expected"),
    [
        (2**23 * 3, 3, 2**23),
        (32 * 4096 * 14336 * 4, 32, 4096 * 14336 * 4 // 28),
        (1000 * 4096, 1000, 500 * 4096),
        (50257 * 768 * 4, 50257, 2**23),
        (3 * 2**21, 3, 2**21),
        (2**26, 2**24, 2**20),
        (0, 0, 2**23),
        (64, 1, 2**23),
    ],
)
def test_parts_follow_rows(num_bytes, num_rows, expected):
    assert part_bytes(num_bytes, num_rows) == expected
