"""Parity law, composed engine: a sharded `TrainStep` computes what the same step computes on one device.

Two runs of the same mathematics add in different orders, so they differ by rounding. How much of that is fair:

- gradients in float32, and parameters under SGD, which is linear in them: 1e-5 relative L2 per leaf;
- adamw amplifies rounding where a gradient is near zero: at most 3 times what two *unsharded* orders of summation differ by;
- 16-bit runs: at most 1.5 times the unsharded 16-bit run's own distance from float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import small_gpt
import small_moe
from closeness import assert_no_worse, assert_same_others, assert_within, gaps, on_host, sizes
from compiling import quick_jit
from pairwise import label, pairwise, product

import jzero

NUM_STEPS = 5
FP32 = 1e-5  # relative L2; DESIGN 6
ORDERS = 3  # times the difference between unsharded orders; DESIGN 6
# Two programs for the same sums differ by up to 6e-8 of a leaf (FACTS): where two orders happen to agree better than that, one
# rounding per step is allowed.
ROUNDING = NUM_STEPS * 6e-8

CORE = {
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16", "fp16", "bf16-pure"),
    "accumulate": (1, 4),
    "clip": (None, 1.0),
    "mesh": tuple(meshes.MESHES),
}
AROUND_ONE = {"tied": True, "loss": "weighted", "optimizer": "adamw"}
AROUND = {"tied": (True, False), "loss": ("mean", "weighted"), "optimizer": ("adamw", "sgd")}


class Step(NamedTuple):
    """Everything about a step but its mesh and stage."""

    precision: str
    accumulate: int
    clip: float | None
    tied: bool
    loss: str
    optimizer: str
    model: str = "gpt"


class Run(NamedTuple):
    """Gradients of the first step, the state after all, and the first and last metrics; on the host."""

    grads: object
    state: object
    loss: float
    norm: float


def keep_gradient():
    """Passes gradients on and keeps the last in its state, where a test can read what the optimizer saw."""
    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    return optax.GradientTransformation(init, lambda grads, state, params=None: (grads, grads))


MODELS = {"gpt": small_gpt, "moe": small_moe}
OPTIMIZERS = {"adamw": lambda: optax.adamw(1e-3), "sgd": lambda: optax.sgd(0.1)}


@functools.cache
def train_step(step):
    return jzero.make_train_step(
        MODELS[step.model].LOSSES[step.loss],
        optax.chain(keep_gradient(), OPTIMIZERS[step.optimizer]()),
        precision=step.precision,
        accumulate=step.accumulate,
        clip_norm=step.clip,
    )


def run(call, step, batch, place=lambda state: state):
    """Five steps on one batch."""
    state = place(train_step(step).init(MODELS[step.model].make_params(tied=step.tied)))
    for index in range(NUM_STEPS):
        state, metrics = call(state, *batch)
        assert not metrics["skipped"], "a skipped step would compare nothing"
        if index == 0:
            grads, loss, norm = on_host(state.opt_state[0]), float(metrics["loss"]), float(metrics["grad_norm"])
    return Run(grads, on_host((state.params, state.opt_state[1], state.step)), loss, norm)


@functools.cache
def jitted(step):
    return quick_jit(train_step(step))


@functools.cache
def unsharded(step):
    return run(jitted(step), step, small_gpt.batch())


@functools.cache
def reordered(step):
    """The same program on the same examples in another order."""
    order = np.random.default_rng(3).permutation(small_gpt.ROWS)
    return run(jitted(step), step, tuple(leaf[order] for leaf in small_gpt.batch()))


def sharded(step, stage, mesh):
    rules = MODELS[step.model].rules(mesh)
    on_mesh = jzero.shard(
        train_step(step), stage=stage, mesh=meshes.make(mesh), min_shard_elements=small_gpt.MIN_SHARD_ELEMENTS, rules=rules
    )
    first, second = (run(on_mesh, step, small_gpt.batch(), on_mesh.place) for _ in range(2))
    nothing = dict.fromkeys(first.state.floats, 0.0)
    assert_within(first.state, second.state, nothing, "the same program twice")
    return first


def relative(leaves, tolerance):
    return {path: tolerance * size for path, size in sizes(leaves).items()}


def largest(*tables):
    return {path: max(table[path] for table in tables) for path in tables[0]}


def check_fp32(step, actual):
    expected = unsharded(step)
    assert_within(actual.grads, expected.grads, relative(expected.grads, FP32), "gradients")
    assert actual.loss == pytest.approx(expected.loss, rel=FP32)
    assert actual.norm == pytest.approx(expected.norm, rel=FP32)
    if step.optimizer == "sgd":
        allowed = relative(expected.state, FP32)
    else:
        other = unsharded(step._replace(accumulate=5 - step.accumulate))  # 4 for 1, 1 for 4
        orders = largest(gaps(expected.state, other.state), gaps(expected.state, reordered(step).state))
        allowed = largest({path: ORDERS * gap for path, gap in orders.items()}, relative(expected.state, ROUNDING))
    assert_within(actual.state, expected.state, allowed, "state")


def check_low_precision(step, actual):
    expected, exact = unsharded(step), unsharded(step._replace(precision="fp32", accumulate=1))
    assert_no_worse(actual.grads, expected.grads, exact.grads)
    assert_no_worse(actual.state, expected.state, exact.state, group=None if step.optimizer == "sgd" else role)
    assert_same_others(actual.state, expected.state, "state")


def role(path):
    """Parameters, first or second moments, as a whole. One sign that adamw turns, where a gradient is near zero, moves an
    element by the learning rate, in a leaf of 96 elements most of the error: two unsharded orders differ there 1.7 times.
    """
    parts = path.split("/")
    return "params" if parts[0] == "0" else parts[2]


def check(entry):
    entry = dict(entry)
    stage, mesh = entry.pop("stage"), entry.pop("mesh")
    step = Step(**entry)
    actual = sharded(step, stage, mesh)
    check_fp32(step, actual) if step.precision == "fp32" else check_low_precision(step, actual)


@pytest.mark.parametrize("entry", pairwise({**CORE, **AROUND}), ids=label)
def test_parity(entry):
    check(entry)


def on_further_axes():
    """A twelfth in `make test`. float16 partial sums over four or eight pieces are rounded before they are added, here as in
    any tensor-parallel program: up to 2.2 times the unsharded error, which the law does not allow.
    """
    entries = pairwise({**CORE, "mesh": tuple(meshes.FURTHER)})
    too_far = pytest.mark.xfail(reason="float16 sums over tensor pieces: 1.6 to 2.2 times the error", raises=AssertionError)
    rounds = [entry["precision"] == "fp16" and entry["mesh"][-1] in "48" for entry in entries]
    marks = [[too_far] * wrong + [pytest.mark.slow] * (index % 12 > 0 or wrong) for index, wrong in enumerate(rounds)]
    return [pytest.param(entry, marks=mark, id=label(entry)) for entry, mark in zip(entries, marks, strict=True)]


@pytest.mark.parametrize("entry", on_further_axes())
def test_parity_on_further_axes(entry):
    check({**AROUND_ONE, **entry})


EXPERTS = {
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "accumulate": (1, 4),
    "clip": (None, 1.0),
    "mesh": tuple(meshes.EXPERT),
    "loss": ("mean", "capacity", "weighted"),
    "optimizer": ("adamw", "sgd"),
}
QUICK_EXPERTS = {
    "stage": 3, "precision": "fp32", "accumulate": 1, "clip": 1.0, "mesh": "expert 4 data 2", "loss": "mean",
    "optimizer": "sgd",
}  # fmt: skip


def with_experts():
    """One in `make test`, all pairs in `make test-all`."""
    slow = [pytest.param(entry, marks=pytest.mark.slow, id=label(entry)) for entry in pairwise(EXPERTS)]
    return [pytest.param(QUICK_EXPERTS, id=label(QUICK_EXPERTS)), *slow]


@pytest.mark.parametrize("entry", with_experts())
def test_parity_with_experts(entry):
    check({"tied": True, "model": "moe", **entry})


KINDS = ("ulysses", "ring")
OWN_SEQUENCE = (
    {"mesh": "data 2 sequence 4", "loss": "ring", "stage": 3, "precision": "fp32", "accumulate": 1, "clip": 1.0},
    {"mesh": "data 2 sequence 2 tensor 2", "loss": "ulysses", "stage": 2, "precision": "fp32", "accumulate": 1, "clip": 1.0},
)


def on_a_split_sequence():
    """Both kinds of attention; one entry in `make test`."""
    others = pairwise({**CORE, "mesh": tuple(meshes.SEQUENCE), "loss": KINDS})
    entries = [*OWN_SEQUENCE, *(entry for entry in others if entry not in OWN_SEQUENCE)]
    marks = [[pytest.mark.slow] * (index > 0) for index in range(len(entries))]
    return [pytest.param(entry, marks=mark, id=label(entry)) for entry, mark in zip(entries, marks, strict=True)]


@pytest.mark.parametrize("entry", on_a_split_sequence())
def test_parity_on_a_split_sequence(entry):
    check({**AROUND_ONE, "optimizer": "sgd", **entry})


def in_full():
    """The whole core, with what surrounds it taken in turn."""
    around = product(AROUND)
    return [{**entry, **around[index % len(around)]} for index, entry in enumerate(product(CORE))]


@pytest.mark.slow
@pytest.mark.parametrize("entry", in_full(), ids=label)
def test_parity_in_full(entry):
    check(entry)
