"""Moments in files: steps, states, checkpoints and reports go as on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from swapped import WIDTH, assert_same, batch, files, loss, make_state, make_step, numbers, train

import jzero
from jzero.offload.nvme.array import DiskArray


def test_moments_rest_in_files_and_training_goes_as_on_the_device(tmp_path, step):
    plain = make_step(None)
    expected, expected_loss = train(plain, make_state(plain), 4)
    state, found_loss = train(step, make_state(step), 4)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    for one, other in zip(numbers(state), numbers(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)  # two programs instead of one, four steps
    moments = [state.opt_state[0].mu, state.opt_state[0].nu]
    assert all(isinstance(leaf, DiskArray) for leaf in jax.tree.leaves(moments))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state.params))
    assert all(path.exists() for path in files(state))
    assert len(files(state)) == 2 * 4 * 8  # moments, parameters, shards


def test_a_leaf_on_disk_is_an_array_like(step):
    state, _ = train(step, make_state(step))
    leaf = state.opt_state[0].mu["w0"]
    assert (leaf.shape, leaf.dtype, leaf.ndim, leaf.size) == ((WIDTH, WIDTH), np.float32, 2, WIDTH**2)
    assert leaf.sharding == NamedSharding(step.mesh, PartitionSpec(None, "data"))
    assert "opt_state/0/mu/w0" in repr(leaf)
    whole = np.asarray(leaf)
    assert leaf.read().sharding.is_equivalent_to(leaf.sharding, 2)
    np.testing.assert_array_equal(leaf.read(), whole)
    np.testing.assert_array_equal(jnp.asarray(leaf), whole)
    np.testing.assert_array_equal(leaf * 2 - leaf, whole)
    np.testing.assert_array_equal(np.sqrt(abs(leaf)), jnp.sqrt(jnp.abs(whole)))
    np.testing.assert_array_equal(leaf[3, :5], whole[3, :5])
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    scaled = jax.tree.map(lambda one: one + 1, state.opt_state[0].mu)
    np.testing.assert_array_equal(scaled["w0"], whole + 1)
    with pytest.raises(ValueError, match=r"jax\.numpy\.array"):  # jax says how
        jax.jit(lambda x: x + 1)(leaf)


@pytest.mark.slow
def test_the_old_state_is_donated(step):
    state = make_state(step)
    after, _ = step(state, batch())
    assert state.params["w0"].is_deleted()
    assert state.opt_state[0].mu["w0"].is_deleted()
    with pytest.raises(RuntimeError, match=r"(?s)donated to a step already.*mu/w.*state, aux = step"):
        np.asarray(state.opt_state[0].mu["w0"])
    with pytest.raises(RuntimeError, match="donated to a step already"):
        step(after._replace(opt_state=(after.opt_state[0]._replace(nu=state.opt_state[0].nu), *after.opt_state[1:])), batch())


@pytest.mark.slow
def test_two_states_of_one_step_do_not_disturb_each_other(step):
    first, second = make_state(step), make_state(step)
    first, _ = train(step, first, 3)
    second, _ = train(step, second, 1)
    second, _ = train(step, second, 2, first=1)
    assert_same(first, second)
    mixed = first._replace(opt_state=(first.opt_state[0]._replace(mu=second.opt_state[0].mu), *first.opt_state[1:]))
    with pytest.raises(ValueError, match=r"(?s)swaps of several.*step.place"):
        step(mixed, batch())
    third, _ = train(step, make_state(step), 2)
    with pytest.raises(ValueError, match=r"(?s)different steps.*3 updates.*update 2"):
        step(first._replace(opt_state=third.opt_state), batch())
    assert_same(step.place(mixed), mixed)


def test_files_go_with_their_state(step):
    state = make_state(step)
    where = files(state)[0].parent
    assert where.exists()
    del state
    assert not where.exists()


def test_a_skipped_step_moves_nothing(tmp_path):
    step = make_step(tmp_path, precision="fp16")
    state, _ = train(step, make_state(step), 1)
    before, stamps = numbers(state), [path.stat().st_mtime_ns for path in files(state)]
    state, metrics = step(state, batch() * np.inf)
    assert bool(metrics["skipped"])
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [path.stat().st_mtime_ns for path in files(state)] == stamps
    state, metrics = step(state, batch())
    assert not bool(metrics["skipped"])
    assert int(state.step) == 2


def test_checkpoints_come_from_the_files_and_go_back(tmp_path, step):
    state, _ = train(step, make_state(step))
    manager = jzero.CheckpointManager(tmp_path / "run", step=step)
    manager.save(3, state)
    manager.wait()
    plain = make_step(None)
    on_device, _ = manager.restore(plain)
    assert_same(on_device, state)
    again, _ = manager.restore(step)
    assert isinstance(again.opt_state[0].nu["w1"], DiskArray)
    assert_same(again, state)
    assert_same(train(step, again, 2, first=3)[0], train(step, state, 2, first=3)[0])
    weights, _ = manager.restore(step, weights_only=True)
    assert isinstance(weights.opt_state[0].nu["w1"], DiskArray)
    assert not np.asarray(weights.opt_state[0].nu["w1"]).any()


@pytest.mark.slow
def test_the_report_says_where_and_how_much(step):
    state = make_state(step)
    report = step.report(state, batch()).to_dict()
    rows = {row["path"]: row for row in report["leaves"]}
    assert rows["opt_state/0/mu/w0"]["memory"].startswith("nvme:")
    assert rows["params/w0"]["memory"] == "device"
    num_bytes = 2 * 4 * WIDTH**2 * 4 // 8
    assert report["bytes_at_rest"]["opt_state"]["measured"] == 4  # the counter
    assert next(size for name, size in report["offload"]["at_rest"].items() if name.startswith("nvme:")) == num_bytes
    assert report["num_compiled"] == 1 + len(report["offload"]["buckets"])
    assert "updated in 4 buckets" in str(step.report(state, batch()))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    assert step.report(shapes, batch()).offload["buckets"] == report["offload"]["buckets"]  # a plan has no files


@pytest.mark.slow
def test_a_state_that_rests_elsewhere(tmp_path, step):
    plain = make_step(None)
    state, on_device = make_state(step), make_state(plain)
    for _ in range(2):  # also once the step has been compiled
        with pytest.raises(
            ValueError, match=r"(?s)8 of \d+ state leaves are not where.*mu/w0.*on the device.*expected nvme:.*step.place"
        ):
            step(on_device, batch())
        with pytest.raises(
            ValueError, match=r"(?s)8 of \d+ state leaves.*mu/w0.*in /.*state-.*expected on the device.*step.place"
        ):
            plain(state, batch())
        train(step, make_state(step), 1)
        train(plain, make_state(plain), 1)
    other = make_step(tmp_path / "other")
    with pytest.raises(ValueError, match=r"(?s)8 of \d+ state leaves.*in /.*swap/process-0.*expected nvme:.*other"):
        other(state, batch())


@pytest.mark.slow
def test_with_what_else_there_is(tmp_path):
    """8-bit moments in files, `verify`, `evaluate`, `offload_states` and back."""
    tx = jzero.optim.moments_8bit(optax.adamw(1e-2), min_elements=64)
    step, plain = make_step(tmp_path / "swap", tx=tx), make_step(None, tx=tx)
    state, loss = train(step, make_state(step))
    assert loss == pytest.approx(train(plain, make_state(plain))[1], rel=1e-4)
    assert isinstance(state.opt_state.inner[0].mu["w0"], DiskArray)
    assert state.opt_state.inner[0].mu["w0"].dtype == np.uint8
    jzero.verify(step, state, batch())
    losses = [float(one.evaluate(one.place(state), batch())["loss"]) for one in (step, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    state = jzero.reload_states(jzero.offload_states(state), step)
    assert int(train(step, state, 1)[0].step) == 4


def test_settings_without_effect_or_meaning(tmp_path):
    train_step = jzero.make_train_step(loss, optax.adamw(1e-2))
    nvme = f"nvme:{tmp_path}"
    for role in ("opt_state", "params"):
        with pytest.raises(ValueError, match=r"(?s)donate=False.*nvme"):
            jzero.shard(train_step, stage=3, donate=False, offload=jzero.Offload(**{role: nvme}))
