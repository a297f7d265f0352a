"""The dynamic loss scale of fp16, and steps that must not happen: NaN, infinity, a batch of total weight zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jzero
from jzero.step.state import initial_loss_scale, next_loss_scale

START, INTERVAL, CREDIT, FLOOR = 2.0**15, 1000, 2, 1.0  # issue 2
STAGES = (0, 1, 2, 3)
WIDTH = 24


# The rule, alone -----------------------------------------------------------------------------------------------------------


class Reference:
    """The scale as the issue words it, in plain Python."""

    def __init__(self):
        self.scale, self.run, self.credit, self.num_skipped = START, 0, CREDIT, 0

    def clean(self):
        self.run += 1
        if self.run == INTERVAL:
            self.scale, self.run, self.credit = self.scale * 2, 0, CREDIT

    def overflow(self):
        self.run, self.num_skipped = 0, self.num_skipped + 1
        if self.credit == 1:
            self.scale = max(self.scale / 2, FLOOR)
        else:
            self.credit -= 1

    def tuple(self):
        return self.scale, self.run, self.credit, self.num_skipped


@jax.jit
def after_run(state, is_clean, num_steps):
    """The state after `num_steps` equal steps."""
    return jax.lax.fori_loop(0, num_steps, lambda _, state: next_loss_scale(state, is_clean, dynamic=True), state)


def plain(state):
    return tuple(leaf.item() for leaf in state)


# runs of clean steps around the interval, of overflows around the credit and down to the floor
RUNS = st.lists(
    st.one_of(
        st.tuples(st.just(True), st.sampled_from([1, 2, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL])),
        st.tuples(st.just(False), st.sampled_from([1, 2, 3, 20])),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(RUNS)
def test_the_scale_follows_the_rule(runs):
    state, reference = initial_loss_scale(dynamic=True), Reference()
    assert plain(state) == reference.tuple() == (START, 0, CREDIT, 0)
    for is_clean, num_steps in runs:
        state = after_run(state, is_clean, num_steps)
        for _ in range(num_steps):
            reference.clean() if is_clean else reference.overflow()
        assert plain(state) == reference.tuple()


def test_without_fp16_the_scale_is_one_and_skips_are_counted():
    state = initial_loss_scale(dynamic=False)
    for is_clean in (True, False, False):
        state = next_loss_scale(state, jnp.asarray(is_clean), dynamic=False)
    assert plain(state) == (1.0, 0, CREDIT, 2)


# The rule in a step --------------------------------------------------------------------------------------------------------


def make_params():
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(0, 1 / np.sqrt(shape[0]), shape), jnp.float32)
    return {"up": draw(WIDTH, 48), "bias": jnp.zeros(48), "down": draw(48, WIDTH)}


def errors(params, x):
    return jnp.mean((jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"] - x) ** 2, axis=-1)


def mean_loss(params, x):
    return jnp.mean(errors(params, x.astype(params["up"].dtype)).astype(jnp.float32))


def rows(num=24):
    return np.random.default_rng(2).normal(size=(num, WIDTH)).astype(np.float32)


def with_scale(state, **fields):
    """The state with some fields of its loss scale set."""
    fresh = {name: jnp.asarray(value, getattr(state.loss_scale, name).dtype) for name, value in fields.items()}
    return state._replace(loss_scale=state.loss_scale._replace(**fresh))


def fp16_step(tx=None, loss=mean_loss, **options):
    return jzero.make_train_step(loss, tx or optax.adamw(1e-3), precision="fp16", **options)


def shard(train_step, stage=3, **mesh):
    return jzero.shard(train_step, stage=stage, mesh=jzero.make_mesh(**(mesh or {"data": 8})), min_shard_elements=64)


def values(tree):
    keys = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [np.asarray(keys(leaf)) for leaf in jax.tree.leaves(tree)]


def pieces(tree):
    """Every device's copy or shard of every leaf, so that devices that disagree show."""
    keys = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [np.array(shard.data) for leaf in jax.tree.leaves(tree) for shard in keys(leaf).addressable_shards]


def assert_equal(left, right):
    assert len(left) == len(right)
    assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(left, right, strict=True))


def test_the_scale_doubles_on_the_thousandth_clean_step():
    train_step = fp16_step()

    @jax.jit
    def many(state, x):
        return jax.lax.scan(lambda state, _: train_step(state, x), state, length=INTERVAL)

    state, metrics = many(train_step.init(make_params()), rows())
    assert not metrics["skipped"].any()
    assert (metrics["loss_scale"] == START).all()  # of each step's own forward pass
    assert plain(state.loss_scale) == (2 * START, 0, CREDIT, 0)


def test_gradients_are_unscaled_by_their_own_scale_also_where_it_grows():
    train_step = fp16_step()
    state = train_step.init(make_params())
    ordinary, before = jax.jit(train_step)(state, rows())
    growing, after = jax.jit(train_step)(with_scale(state, clean_steps=INTERVAL - 1), rows())
    assert float(growing.loss_scale.scale) == 2 * float(ordinary.loss_scale.scale) == 2 * START
    assert_equal(values((ordinary.params, ordinary.opt_state)), values((growing.params, growing.opt_state)))
    for name in ("loss", "grad_norm", "loss_scale"):
        assert float(before[name]) == float(after[name])


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_on_a_mesh_follows_the_rule(stage):
    """From a scale that overflows: skips at credit 2, halves at 1, until a step is clean; then grows.

    How many halvings that takes differs from one device: a shard's sum of an eighth of the batch overflows later.
    """
    train_step = fp16_step()
    step = shard(train_step, stage)
    start = 2.0**24
    state = step.place(with_scale(train_step.init(make_params()), scale=start))
    reference, skips = Reference(), []
    reference.scale = start
    for _ in range(12):
        scale = reference.scale
        state, metrics = step(state, rows())
        skips.append(bool(metrics["skipped"]))
        reference.overflow() if skips[-1] else reference.clean()
        assert plain(state.loss_scale) == reference.tuple()
        assert (float(metrics["loss_scale"]), int(metrics["num_skipped"])) == (scale, sum(skips))
        assert int(state.step) == skips.count(False)
    assert skips == sorted(skips, reverse=True), "once it fits, it fits"
    assert 3 <= sum(skips) < 12
    state, metrics = step(step.place(with_scale(state, clean_steps=INTERVAL - 1)), rows())
    assert not metrics["skipped"]
    assert plain(state.loss_scale) == (2 * reference.scale, 0, CREDIT, sum(skips))


# Steps that must not happen ------------------------------------------------------------------------------------------------


def scheduled():
    """Moments, counts, a schedule and hyperparameters in the state: everything a skipped step must leave alone."""
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    return optax.chain(optax.inject_hyperparams(optax.adamw)(learning_rate=schedule), optax.ema(0.9))


def counting_loss(params, x, model_state):
    """A model state that is the same on every shard."""
    return mean_loss(params, x), {"model_state": {"calls": model_state["calls"] + 1}}


def statistics_loss(params, x, model_state):
    """Batch statistics: examples meet, so the gradient is computed under its global meaning."""
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, axis=0)
    return mean_loss(params, x - mean), {"model_state": {"mean": mean}}


MODEL_STATES = {counting_loss: {"calls": jnp.zeros((), jnp.int32)}, statistics_loss: {"mean": jnp.zeros(WIDTH)}}


def poisoned(value, row=5):
    """One bad number in one example, so on one device only."""
    batch = rows()
    batch[row, 3] = value
    return batch


@pytest.mark.parametrize(
    ("stage", "precision", "loss"),
    [
        (0, "fp32", counting_loss),
        (0, "fp16", statistics_loss),
        (1, "fp16", counting_loss),
        (1, "fp32", statistics_loss),
        (2, "fp16", counting_loss),
        (2, "fp32", statistics_loss),
        (3, "fp16", counting_loss),
        (3, "bf16-pure", counting_loss),
        (3, "fp16", statistics_loss),
    ],
)
def test_a_skipped_step_changes_nothing_on_any_device(stage, precision, loss):
    train_step = jzero.make_train_step(loss, scheduled(), precision=precision, accumulate=3, clip_norm=1.0)
    step = shard(train_step, stage, **({"data": 4, "replica": 2} if stage % 2 else {"data": 8}))
    state = step.place(train_step.init(make_params(), model_state=MODEL_STATES[loss]))
    state, _ = step(state, rows())
    bad_values = (np.nan, np.inf, -np.inf) if precision != "fp16" else (np.nan, 1e5)  # the last is finite until it is cast
    for count, bad in enumerate(bad_values, start=1):
        before, scales = pieces(state._replace(loss_scale=None)), plain(state.loss_scale)
        state, metrics = step(state, poisoned(bad))
        assert_equal(pieces(state._replace(loss_scale=None)), before)
        assert state.loss_scale.num_skipped == scales[-1] + 1 == count
        assert (bool(metrics["skipped"]), int(metrics["num_skipped"])) == (True, count)
    before = pieces(state.params)
    state, metrics = step(state, rows())
    assert not metrics["skipped"]
    assert int(metrics["num_skipped"]) == len(bad_values)
    assert int(state.step) == 2
    assert any(not np.array_equal(a, b) for a, b in zip(pieces(state.params), before, strict=True))


def masked_loss(params, x, mask):
    return jzero.weighted(jnp.sum(mask * errors(params, x)), jnp.sum(mask))


@pytest.mark.parametrize("stage", STAGES)
def test_total_weight_zero_skips_the_step_and_a_shard_without_weight_does_not(stage):
    train_step = jzero.make_train_step(masked_loss, optax.adamw(1e-3), accumulate=3)
    step = shard(train_step, stage)
    state = step.place(train_step.init(make_params()))
    before = pieces(state._replace(loss_scale=None))
    state, metrics = step(state, rows(), np.zeros(24, np.float32))
    assert_equal(pieces(state._replace(loss_scale=None)), before)
    assert bool(metrics["skipped"])
    with pytest.raises(FloatingPointError, match=r"total weight 0\.0"):
        jzero.check(metrics)
    first_only = (np.arange(24) == 0).astype(np.float32)
    state, metrics = step(state, rows(), first_only)
    assert not metrics["skipped"]
    jzero.check(metrics)
    expected = float(errors(make_params(), rows()[:1])[0])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)  # one example: the same few products, summed in float32


def root_loss(params, x):
    """The loss is finite, but the gradient with respect to `bias` is infinite where it is zero."""
    return mean_loss(params, x) + jnp.sum(jnp.sqrt(params["bias"]))


def test_check_names_the_step_and_the_first_leaf():
    train_step = jzero.make_train_step(root_loss, optax.sgd(1e-3))
    step = shard(train_step)
    params = {**make_params(), "bias": jnp.ones(48)}
    state, metrics = step(step.place(train_step.init(params)), rows())
    jzero.check(metrics)
    state = step.place(state._replace(params={**state.params, "bias": jnp.zeros(48)}))
    state, metrics = step(state, rows())
    assert np.isfinite(float(metrics["loss"]))
    assert bool(metrics["skipped"])
    with pytest.raises(FloatingPointError) as error:
        jzero.check(metrics)
    message = str(error.value)
    assert "step 1 is not finite" in message
    assert "first non-finite gradient: bias (1 of 3 leaves)" in message
    assert "the update was skipped" in message
    jzero.check(step(step.place(state._replace(params=params)), rows())[1])


def test_check_names_a_loss_that_is_not_finite():
    train_step = jzero.make_train_step(mean_loss, optax.sgd(1e-3))
    _, metrics = jax.jit(train_step)(train_step.init(make_params()), poisoned(np.inf))
    with pytest.raises(FloatingPointError, match="first non-finite gradient: bias \\(3 of 3 leaves\\)"):
        jzero.check(metrics)
    assert not np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("stage", [0, 3])
def test_skip_nonfinite_false_goes_on(stage):
    train_step = jzero.make_train_step(mean_loss, optax.sgd(1e-3), skip_nonfinite=False)
    step = shard(train_step, stage)
    state, metrics = step(step.place(train_step.init(make_params())), poisoned(np.nan))
    assert (bool(metrics["skipped"]), int(metrics["num_skipped"]), int(state.step)) == (False, 0, 1)
    assert all(np.isnan(leaf).all() for leaf in values(state.params))
    with pytest.raises(FloatingPointError, match="the update was made"):
        jzero.check(metrics)


def test_fp16_cannot_go_on_after_an_overflow():
    with pytest.raises(ValueError, match="fp16 lives by skipping"):
        fp16_step(skip_nonfinite=False)
