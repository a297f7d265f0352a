"""Parity law of offload for steps that jzero did not write: cut where the optimizer's arrays enter, they compute the same.

As in `test_parity_offload.py` each of ten steps is taken twice from the same state, whole on the device and cut, and may differ
by 2 units in the last place of the leaf's largest number: two programs round differently. Moments that are stored coarsely may
round the other way where that last place differs, by one unit of what they store.
"""

import jax
import jax.numpy as jnp
import meshes
import own_step
import pytest
from elsewhere import ON_HOST, assert_at_rest, assert_close
from pairwise import label, pairwise
from tables import LEARNING_RATE, OPTIMIZERS

import jzero

NUM_STEPS = 10
MIXES = {
    "opt": {"opt_state": "host"},
    "opt in buckets": {"opt_state": "host", "bucket_bytes": 4000},  # several to a bucket, and leaves in slices
    "params": {"params": "host"},
    "both": {"opt_state": "host", "params": "host", "bucket_bytes": 6000},
    "part": {"opt_state": "host", "fraction": 0.6, "bucket_bytes": 20000},
}
# An average of Adam's updates holds quotients: of a moment that may be two units off, and the root of another (half of two).
ULPS = {"ema": 4}
# One unit of what is stored coarsely moves a parameter by that part of Adam's step.
RESOLUTION = {"moments_8bit": 2.0**-6, "moments_bf16": 2.0**-8, "fused_8bit": 2.0**-6, "fused_bf16": 2.0**-8}
WITHOUT_ARRAYS = ("sgd", "sgd_schedule")
FACTORS = {
    "mix": tuple(MIXES),
    "stage": (0, 1, 2, 3),
    "mesh": tuple(meshes.MESHES),
    "optimizer": tuple(name for name in OPTIMIZERS if name not in (*WITHOUT_ARRAYS, *RESOLUTION)),
}
IN_SHORT = (
    ("opt in buckets", 1, "2", "clipped"),
    ("both", 3, "8", "multi_steps"),
)


def steps(make, *, stage, mesh, mix, update="device", **options):
    """The step whole on the device, and cut."""
    options |= {"stage": stage, "mesh": meshes.make(mesh), "min_shard_elements": own_step.MIN_SHARD_ELEMENTS}
    return jzero.shard(make, **options), jzero.shard(make, **options, offload=jzero.Offload(**MIXES[mix], update=update))


def walk(on_device, cut, state, *, relative=0.0, **ulps):
    state = on_device.place(state)
    for _ in range(NUM_STEPS):
        elsewhere = cut.place(state)
        assert assert_at_rest(cut, elsewhere), "nothing is offloaded: this would compare nothing"
        state, expected = on_device(state, *own_step.batch())
        elsewhere, actual = cut(elsewhere, *own_step.batch())
        assert_at_rest(cut, elsewhere)
        assert_close(elsewhere, state, relative, **ulps)
        assert jax.tree.map(float, actual) == pytest.approx(jax.tree.map(float, expected), rel=1e-6)
    return elsewhere


def check(mix, stage, mesh, optimizer, update="device"):
    both = steps(own_step.make_step(optimizer), stage=stage, mesh=mesh, mix=mix, update=update)
    ulps = {"ulps": ULPS[optimizer]} if optimizer in ULPS else {}
    walk(*both, own_step.initial(optimizer), relative=ON_HOST if update == "host" else 0.0, **ulps)


@pytest.mark.parametrize("entry", IN_SHORT, ids=lambda one: "-".join(map(str, one)))
def test_a_cut_step_is_the_whole_one(entry):
    check(*entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", pairwise(FACTORS), ids=label)
def test_a_cut_step_is_the_whole_one_in_full(entry):
    check(**entry)


@pytest.mark.parametrize(
    "optimizer", [pytest.param("adamw"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "clipped"))]
)
def test_the_host_updates_a_cut_step(optimizer):
    check("opt in buckets", 3, "8", optimizer, "host")


def averaging_step(state, x, y):
    """A step as users write them: an average of the parameters beside them, and no update where a gradient is not finite."""
    optimizer = OPTIMIZERS["adamw"]()
    loss, grads = jax.value_and_grad(own_step.loss_fn)(state["params"], x, y)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
    is_finite = jnp.isfinite(norm) & (state["step"] != 4)

    def proceed(params, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    stay = lambda params, opt_state: (params, opt_state)
    params, opt_state = jax.lax.cond(is_finite, proceed, stay, state["params"], state["opt_state"])
    average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["average"], params)
    new = {"params": params, "opt_state": opt_state, "average": average, "step": state["step"] + 1}
    return new, {"loss": loss, "norm": norm}


@pytest.mark.parametrize(
    ("stage", "mesh"), [(3, "8"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, "2"), (0, "1")))]
)
def test_averages_and_skipped_updates_are_cut_too(stage, mesh):
    params = own_step.make_params()
    state = {"params": params, "opt_state": OPTIMIZERS["adamw"]().init(params), "average": params, "step": jnp.int32(0)}
    new = walk(*steps(averaging_step, stage=stage, mesh=mesh, mix="opt in buckets"), jax.tree.map(jnp.copy, state))
    assert int(new["opt_state"][0].count) == NUM_STEPS - 1, "one update was skipped"


@pytest.mark.parametrize("name", RESOLUTION)
@pytest.mark.slow
def test_compressed_moments_of_a_cut_step(name):
    """One step: what is coarse differs by at most one of its units, and parameters by that part of a step."""
    on_device, cut = steps(own_step.make_step(name), stage=3, mesh="2", mix="opt")
    state = own_step.initial(name)
    expected, _ = on_device(on_device.place(state), *own_step.batch())
    elsewhere = cut.place(state)
    assert assert_at_rest(cut, elsewhere)
    actual, _ = cut(elsewhere, *own_step.batch())
    for wanted, found in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(actual[0]), strict=True):
        assert float(jnp.max(jnp.abs(jax.device_get(wanted) - jax.device_get(found)))) <= LEARNING_RATE * RESOLUTION[name]


def test_what_a_step_prints_is_printed_once():
    """By its first part: the updates, of two buckets, would have to compute the loss again to print it."""
    seen = []

    def printing_step(state, x, y):
        new, loss = own_step.make_step("adamw")(state, x, y)
        jax.debug.callback(lambda value: seen.append(float(value)), loss)
        return new, loss

    _, cut = steps(printing_step, stage=3, mesh="1", mix="opt in buckets")
    state = cut.place(own_step.initial("adamw"))
    losses = []
    for _ in range(2):
        state, loss = cut(state, *own_step.batch())
        losses.append(float(loss))
    jax.effects_barrier()
    assert len(cut.report(state, *own_step.batch()).offload["buckets"]) > 1
    assert seen == losses


def test_the_state_that_came_in_stays_valid_without_donation():
    step, cut = steps(own_step.make_step("adamw"), stage=3, mesh="2", mix="opt in buckets", donate=False)
    before = cut.place(own_step.initial("adamw"))
    first, _ = cut(before, *own_step.batch())
    again, _ = cut(before, *own_step.batch())
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert_close(again, first)
    expected, _ = step(step.place(own_step.initial("adamw")), *own_step.batch())
    assert_close(first, expected)
