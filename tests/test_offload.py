"""Offload to host memory: where leaves rest, how they are cut into buckets, what is refused, and what a step leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from jax.sharding import PartitionSpec
from laws import tiny

import jzero
from jzero.engine import bucket_program, computing
from jzero.offload import buckets, host, slices


def make(tx=None, *, stage=3, data=8, offload=None, **options):
    """A step that keeps its optimizer's arrays in host memory, and its first state."""
    train_step = jzero.make_train_step(tiny.loss_fn, tx or optax.adamw(1e-2), **options)
    step = jzero.shard(
        train_step, stage=stage, mesh=jzero.make_mesh(data=data, devices=jax.devices()[:data]), min_shard_elements=1,
        offload=offload or jzero.Offload(opt_state="host"),
    )  # fmt: skip
    return step, lambda: train_step.init(tiny.make_params())


def kinds(tree):
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def plan_of(step, make_state):
    state = jax.eval_shape(make_state)
    return step._plan(step._layout(state))


def test_moments_rest_in_host_memory_from_the_first_moment_on():
    step, make_state = make()
    state = step.init(make_state)
    for _ in range(3):
        assert kinds(state.opt_state[0].mu) == kinds(state.opt_state[0].nu) == ["pinned_host"] * 3
        assert set(kinds((state.params, state.opt_state[0].count, state.rng, state.loss_scale))) == {"device"}
        assert jax.tree.leaves(state.opt_state[0].mu)[0].sharding.spec != PartitionSpec()
        state, _ = step(state, tiny.batch())


def test_the_old_state_is_given_up_and_the_callers_own_survives():
    step, make_state = make()
    own = make_state()
    state = step.place(own)
    old = jax.tree.leaves(state)
    state, _ = step(state, tiny.batch())
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("fraction", [1.0, 0.7, 0.2])
def test_a_fraction_goes_and_the_smallest_leaves_stay(fraction):
    step, make_state = make(offload=jzero.Offload(opt_state="host", params="host", fraction=fraction))
    state = jax.eval_shape(make_state)
    placed = step._layout(state)
    sizes = {
        index: leaf.size
        for index, leaf in enumerate(placed.avals)
        if placed.placements[index].leaf.role != "other" and leaf.shape
    }
    gone = {index for index, place in enumerate(placed.places) if place is not None}
    assert gone <= set(sizes)
    total, moved = sum(sizes.values()), sum(sizes[index] for index in gone)
    assert moved >= fraction * total
    assert moved - min(sizes[index] for index in gone) < fraction * total, "one leaf more than asked"
    assert all(sizes[index] <= min(sizes[other] for other in gone) for index in sizes if index not in gone)


@pytest.mark.parametrize("name", [name for name in tables.OPTIMIZERS if "sgd" not in name])
def test_every_optimizer_of_the_table_is_cut_into_one_group_per_parameter(name):
    step, make_state = make(tables.OPTIMIZERS[name](), offload=jzero.Offload(opt_state="host", bucket_bytes=1))
    plan = plan_of(step, make_state)
    assert sorted(index for bucket in plan.buckets for index in bucket.params) == [0, 1, 2]
    assert all(len(bucket.params) == 1 for bucket in plan.buckets if bucket.moved_bytes)
    assert sorted(index for bucket in plan.buckets for index in bucket.opt_state) == sorted(plan.arrays)


def test_a_norm_of_gradients_is_computed_once_and_a_trust_ratio_where_its_leaf_is():
    clipped, make_state = make(tables.OPTIMIZERS["clipped"]())
    assert len(plan_of(clipped, make_state).split.early) == 2  # whether it clips, and by what
    chained = optax.chain(optax.adamw(1e-2), optax.scale_by_trust_ratio())
    assert len(plan_of(*make(chained)).split.groups) == 3
    with pytest.raises(ValueError, match=r"3 parameters \(params/bias, params/down, params/up\) meet: .*tree_sum"):
        plan_of(*make(optax.chain(optax.adamw(1e-2), optax.clip_by_global_norm(1.0))))


@pytest.mark.slow
def test_a_large_leaf_comes_in_slices_if_its_update_is_elementwise():
    narrow = jzero.Offload(opt_state="host", bucket_bytes=200)
    found = {}
    for name in ("adamw", "muon"):
        step, make_state = make(tables.OPTIMIZERS[name](), offload=narrow)
        plan = plan_of(step, make_state)
        large = [bucket for bucket in plan.buckets if bucket.moved_bytes > 200]
        found[name] = [bucket_program.BucketProgram(plan, bucket, step.options).slices for bucket in large]
    assert [one.num for one in found["adamw"]] == [6, 6]  # 1,152 bytes each
    assert found["muon"] == [None, None]


def test_slices_are_equal_and_leave_split_dims_alone():
    mesh = jzero.make_mesh(data=8)
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "data"))
    assert slices.cut((12, 64), [sharding], 1000, 250) == slices.Slices(0, 4, 3)
    assert slices.cut((12, 64), [sharding], 1000, 200) == slices.Slices(0, 6, 2)  # 5 does not divide 12
    assert slices.cut((13, 64), [sharding], 1000, 250) == slices.Slices(0, 13, 1)
    assert slices.cut((64,), [jax.NamedSharding(mesh, PartitionSpec("data"))], 1000, 250) is None
    whole = jax.NamedSharding(mesh, PartitionSpec())
    assert slices.cut((4, 256), [whole], 6000, 100) == slices.Slices(1, 64, 4)
    assert slices.cut((4, 256), [whole], 6000, 100, on_tpu=True) == slices.Slices(1, 2, 128)  # no tile is cut
    assert slices.cut((4, 4096), [whole], 6000, 400, on_tpu=True) == slices.Slices(1, 16, 256)
    assert slices.cut((13, 64), [sharding], 1000, 50) == slices.Slices(0, 13, 1)  # as many as there can be


def test_a_skipped_step_moves_nothing_back():
    step, make_state = make(precision="fp16")
    state = step.init(make_state)
    scale = jax.device_put(jnp.float32(2.0**60), state.loss_scale.scale.sharding)
    state = state._replace(loss_scale=state.loss_scale._replace(scale=scale))
    before = jax.tree.leaves(state.opt_state[0].mu)
    state, metrics = step(state, tiny.batch())
    assert metrics["skipped"]
    assert int(state.step) == int(state.opt_state[0].count) == 0
    assert all(old is new for old, new in zip(before, jax.tree.leaves(state.opt_state[0].mu), strict=True))


@pytest.mark.slow
def test_no_second_program_and_one_kind_for_each_leaf():
    step, make_state = make(offload=jzero.Offload(opt_state="host", params="host"))
    state = step.init(make_state)
    step(step.place(state), tiny.batch())
    programs, first = len(step._programs), step.shardings(state)
    state, _ = step(state, tiny.batch())
    assert len(step._programs) == programs == 1
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == jax.tree.leaves(first)


def test_the_report_counts_memories_apart():
    everything = jzero.Offload(opt_state="host", params="host", bucket_bytes=600)
    plain, make_state = make()
    step, _ = make(offload=everything)
    state = jax.eval_shape(make_state)
    report = step.report(state, tiny.batch())
    at_rest = {role: figure["measured"] for role, figure in report.bytes_at_rest.items()}
    assert (at_rest["params"], at_rest["opt_state"]) == (0, 4)  # adam's count
    assert report.offload["at_rest"]["pinned_host"] == 12 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) // 8
    assert report.offload["moved_bytes"] == report.offload["at_rest"]["pinned_host"]
    assert all(row["held_bytes"] <= 600 for row in report.offload["buckets"])
    assert {row["memory"] for row in report.leaves} == {"device", "pinned_host"}
    assert "pinned_host" in str(report)
    kept = plain.report(state, tiny.batch()).bytes_at_rest
    assert kept["params"] == {"measured": 4 * 2352 // 8, "formula": 4 * 2352 // 8}
    assert kept["opt_state"] == {"measured": 4, "formula": 4}


def on_host(**asked):
    return jzero.Offload(**({"opt_state": "host"} | asked), update="host")


@pytest.mark.parametrize(
    "asked", [pytest.param({}, marks=pytest.mark.slow), {"bucket_bytes": 300}, {"params": "host"}], ids=str
)
def test_what_the_host_updates_does_not_travel(asked):
    step, make_state = make(offload=on_host(**asked))
    state = jax.eval_shape(make_state)
    offload = step.report(state, tiny.batch()).offload
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) // 8
    beside = 0 if "params" in asked else size
    assert (offload["moved_bytes"], offload["back_bytes"]) == (size + beside, beside)
    assert all(row["update"] == "host" and row["held_bytes"] == 0 for row in offload["buckets"])
    assert any(row["slices"] > 1 for row in offload["buckets"]) == ("bucket_bytes" in asked)
    assert offload["update"] == {"asked": "host"}


@pytest.mark.slow
def test_a_step_that_is_skipped_leaves_alone_what_the_host_updates():
    step, make_state = make(precision="fp16", offload=on_host())
    state = step.init(make_state)
    scale = jax.device_put(jnp.float32(2.0**60), state.loss_scale.scale.sharding)
    state = state._replace(loss_scale=state.loss_scale._replace(scale=scale))
    before = jax.tree.leaves(state.opt_state[0].mu)
    state, metrics = step(state, tiny.batch())
    assert metrics["skipped"]
    assert all(old is new for old, new in zip(before, jax.tree.leaves(state.opt_state[0].mu), strict=True))


AUTO = jzero.Offload(opt_state="host", params="host", update="auto")


def as_if_measured(monkeypatch, link, host):
    monkeypatch.setattr(computing, "_untimed", lambda mesh: "")
    monkeypatch.setattr(buckets, "measure", lambda mesh: (1e-5, link))
    monkeypatch.setattr(buckets, "measure_host", lambda mesh: host)


@pytest.mark.parametrize(("host", "wins"), [(3.4e9, False), (3.6e9, True)])
def test_where_to_update_follows_from_what_was_measured(monkeypatch, host, wins):
    """Adam, bytes a parameter: 12 each way over the link, or 4 over it and 28 of the host's memory. Even at 3.5 to 1."""
    as_if_measured(monkeypatch, 1e9, host)
    step, make_state = make(offload=AUTO)
    report = step.report(jax.eval_shape(make_state), tiny.batch())
    num = 2352 // 8
    assert {row["update"] for row in report.offload["buckets"]} == {"host" if wins else "device"}
    figures = report.offload["update"]
    assert figures["device_s"] == pytest.approx(12 * num / 1e9)
    assert figures["host_s"] == pytest.approx(4 * num / 1e9 + 28 * num / host)
    assert any(f"the update of {3 * wins} of 3 parameters" in line for line in report.findings)


def test_what_the_host_cannot_update_stays_with_the_device(monkeypatch):
    as_if_measured(monkeypatch, 1e9, 1e12)
    plan = plan_of(*make(tables.OPTIMIZERS["muon"](), offload=AUTO))
    assert [(bucket.on_host, bucket.params) for bucket in plan.buckets] == [(False, (1, 2)), (True, (0,))]  # the bias is Adam's
    assert any(
        "2 parameters stay with the device; of the first reshape is not elementwise" in one for one in plan.computed.findings
    )


def test_what_cannot_be_timed_is_updated_on_the_device(monkeypatch):
    def fail(mesh):
        raise NotImplementedError("no such thing here")

    said = plan_of(*make(offload=AUTO)).computed.findings
    assert said == ["update='auto' is computed on the device: these devices are the host's own processors"]
    as_if_measured(monkeypatch, 1e9, 1e12)
    monkeypatch.setattr(buckets, "measure_host", fail)
    plan = plan_of(*make(offload=AUTO))
    assert not any(bucket.on_host for bucket in plan.buckets)
    assert "the host could not be timed (NotImplementedError: no such thing here)" in plan.computed.findings[0]


def test_the_host_is_timed_by_an_update_of_its_own(monkeypatch):
    monkeypatch.setattr(buckets, "PROBE_BYTES", 2**16)
    assert 1e6 < buckets.measure_host(jzero.make_mesh(data=4, tensor=2)) < 1e13


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(on_host(params="host", bucket_bytes=300), id="host"),
        pytest.param(jzero.Offload(opt_state="host", fraction=0.7), id="fraction", marks=pytest.mark.slow),
    ],
)
def test_without_donation_the_old_state_is_there_again(asked):
    """What a program takes where it rests is the state's own."""
    train_step = jzero.make_train_step(tiny.loss_fn, optax.adamw(1e-2))
    step = jzero.shard(train_step, stage=3, donate=False, min_shard_elements=1, offload=asked)
    state = step.place(train_step.init(tiny.make_params()))
    found = [step(state, tiny.batch())[0] for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *[(one.params, one.opt_state) for one in found])


def test_host_memory_that_is_too_small_is_known_before(monkeypatch):
    step, make_state = make()
    monkeypatch.setattr(host, "free_host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"need 18,816 bytes of host memory .* 1,000 are free") as caught:
        step.init(make_state)
    for words in ("fraction=0.05", "mu/down"):
        assert words in str(caught.value)


def test_a_back_end_without_the_memory_kind_is_refused(monkeypatch):
    step, make_state = make()
    monkeypatch.setattr(host, "KIND", "pinned_moon")
    with pytest.raises(NotImplementedError, match=r"no memory kind 'pinned_moon'\n.*has device, pinned_host, unpinned_host"):
        step.init(make_state)


@pytest.mark.slow
def test_a_step_without_donation_keeps_the_old_state():
    train_step = jzero.make_train_step(tiny.loss_fn, optax.adamw(1e-2))
    step = jzero.shard(train_step, stage=3, donate=False, min_shard_elements=1, offload=jzero.Offload(opt_state="host"))
    state = step.place(train_step.init(tiny.make_params()))
    first, _ = step(state, tiny.batch())
    again, _ = step(state, tiny.batch())
    for left, right in zip(jax.tree.leaves(first.opt_state), jax.tree.leaves(again.opt_state), strict=True):
        np.testing.assert_array_equal(left, right)


def test_evaluation_reads_parameters_from_host_memory():
    step, make_state = make(offload=jzero.Offload(params="host"))
    state = step.init(make_state)
    loss = step.evaluate(state, tiny.batch())["loss"]
    assert float(loss) == pytest.approx(float(tiny.loss_fn(tiny.make_params(), tiny.batch())), rel=1e-6)
    assert kinds(state.params) == ["pinned_host"] * 3


def test_a_state_moves_away_and_back():
    for offload in (None, jzero.Offload(opt_state="host")):
        train_step = jzero.make_train_step(tiny.loss_fn, optax.adamw(1e-2))
        step = jzero.shard(train_step, stage=3, min_shard_elements=1, offload=offload)
        state = step.init(lambda train_step=train_step: train_step.init(tiny.make_params()))
        before, old = jax.device_get(state.params), jax.tree.leaves(state.params)
        away = jzero.offload_states(state)
        assert set(kinds((away.params, away.opt_state[0].mu))) == {"pinned_host"}
        assert all(leaf.is_deleted() for leaf in old)
        with pytest.raises(ValueError, match=r"not where this step keeps them\n  params/bias .* in pinned_host +expected"):
            step(away, tiny.batch())
        back = jzero.reload_states(away, step)
        assert [leaf.sharding for leaf in jax.tree.leaves(back)] == jax.tree.leaves(step.shardings(back))
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(back.params))
        step(back, tiny.batch())


def test_checkpoints_are_written_from_and_read_to_where_the_state_rests(tmp_path):
    step, make_state = make(offload=jzero.Offload(opt_state="host", params="host", fraction=0.9))
    state, _ = step(step.init(make_state), tiny.batch())
    jzero.save(tmp_path / "one", state)
    same = jzero.restore(tmp_path / "one", step)
    assert [leaf.sharding for leaf in jax.tree.leaves(same)] == [leaf.sharding for leaf in jax.tree.leaves(state)]
    plain = jzero.shard(step.fn, stage=1, min_shard_elements=1)
    elsewhere = jzero.restore(tmp_path / "one", plain)
    assert set(kinds(elsewhere)) == {"device"}
    for other in (same, elsewhere):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(other.opt_state), jax.device_get(state.opt_state))
    (after, metrics), (expected, others) = step(same, tiny.batch()), plain(elsewhere, tiny.batch())
    assert float(metrics["loss"]) == pytest.approx(float(others["loss"]), rel=1e-6)
    assert int(after.step) == int(expected.step) == 2
