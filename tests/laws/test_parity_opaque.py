"""Parity law, opaque engine: any step under a stage computes what it computes on one device, whatever optax optimizer is in it.

Sharding moves where sums are split, so results differ by rounding. SGD is linear in the gradients: 1e-5 relative L2 per
leaf after five steps. Optimizers that normalise or take signs amplify rounding, most where the true gradient is zero: at
most 3 times what *unsharded* orders of summation differ by (DESIGN 6).
"""

import functools

import meshes
import numpy as np
import pytest
from closeness import assert_within, gaps, on_host, sizes
from compiling import quick_jit
from own_step import MIN_SHARD_ELEMENTS, ROWS, batch, initial, make_step
from pairwise import label, pairwise, product
from tables import LEARNING_RATE, OPTIMIZERS

import jzero

NUM_STEPS = 5
LINEAR = ("sgd", "momentum", "sgd_schedule")
FP32 = 1e-5  # relative L2; DESIGN 6
ORDERS = 3  # times the difference between unsharded orders; DESIGN 6
ROUNDING = NUM_STEPS * 6e-8  # two programs differ by up to 6e-8 of a leaf (FACTS), whatever two orders of one program do
# A moment that is stored coarsely may round the other way where sums differ in the last bit: by one part in so many.
RESOLUTION = {"moments_8bit": 2.0**-6, "moments_bf16": 2.0**-8, "fused_8bit": 2.0**-6, "fused_bf16": 2.0**-8}

FACTORS = {"stage": (0, 1, 2, 3), "mesh": tuple(meshes.MESHES), "optimizer": tuple(OPTIMIZERS)}


def run(step, state, batch):
    for _ in range(NUM_STEPS):
        state, loss = step(state, *batch)
        loss = float(loss)  # also waits: simulated devices may deadlock with several steps in flight
    return on_host(state), loss


@functools.cache
def unsharded(optimizer):
    """The state after five steps, and per leaf how far orders of summation drive it apart."""
    step = quick_jit(make_step(optimizer))
    expected, loss = run(step, initial(optimizer), batch())
    reordered, _ = run(step, initial(optimizer), batch(np.random.default_rng(3).permutation(ROWS)))
    accumulated, _ = run(quick_jit(make_step(optimizer, accumulate=4)), initial(optimizer), batch())
    apart = [gaps(expected, reordered), gaps(expected, accumulated), gaps(reordered, accumulated)]
    return expected, loss, {path: max(table[path] for table in apart) for path in apart[0]}


def check(stage, mesh, optimizer):
    expected, expected_loss, apart = unsharded(optimizer)
    step = jzero.shard(make_step(optimizer), stage=stage, mesh=meshes.make(mesh), min_shard_elements=MIN_SHARD_ELEMENTS)
    actual, loss = run(step, step.place(initial(optimizer)), batch())
    floor = FP32 if optimizer in LINEAR else ROUNDING
    allowed = {path: max(ORDERS * apart[path], floor * size) for path, size in sizes(expected).items()}
    if optimizer in RESOLUTION:
        coarse = {path: _coarse(path, leaf, RESOLUTION[optimizer]) for path, leaf in expected.floats.items()}
        allowed = {path: max(size, coarse[path]) for path, size in allowed.items()}
    assert_within(actual, expected, allowed, "state")
    assert loss == pytest.approx(expected_loss, rel=FP32)
    again, _ = run(step, step.place(initial(optimizer)), batch())
    assert_within(again, actual, dict.fromkeys(allowed, 0.0), "the same program twice")


def _coarse(path, leaf, resolution):
    """L2 of what one coarse rounding per step moves: of a moment its own resolution, of a parameter Adam's step times that."""
    size = np.linalg.norm(leaf) if path.startswith("1/") else NUM_STEPS * LEARNING_RATE * np.sqrt(leaf.size)
    return resolution * size


def covered():
    """Every pair. Compressed moments, whose programs compile longest, are slow but at stage 3; fused ones but one."""
    plain = lambda entry: entry["optimizer"] == "fused_adamw" and (entry["stage"], entry["mesh"]) == (1, "8")
    is_fused = lambda entry: entry["optimizer"].startswith("fused") and not plain(entry)
    late = lambda entry: is_fused(entry) or (entry["optimizer"] in RESOLUTION and entry["stage"] < 3)
    return [pytest.param(entry, marks=[pytest.mark.slow] * late(entry), id=label(entry)) for entry in pairwise(FACTORS)]


@pytest.mark.parametrize("entry", covered())
def test_parity(entry):
    check(**entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", product(FACTORS), ids=label)
def test_parity_in_full(entry):
    check(**entry)
