"""Parameters in files: on the device while a step runs, and nowhere else."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from swapped import WIDTH, assert_same, batch, by_rows, loss, make_params, make_state, numbers, shard_file, train
from test_nvme_damage import flip
from test_nvme_disks import small_files as small_files

import jzero
from jzero.offload.nvme import direct
from jzero.offload.nvme.array import DiskArray
from jzero.offload.nvme.shard_file import CorruptSwap, ShardFile
from jzero.offload.nvme.swap import Swap

LEAF_BYTES = 4 * WIDTH**2


def make_step(where, *, params=None, opt_state="same", tx=None, bucket_bytes=4096, fraction=1.0, mesh=None, **options):
    """As `swapped.make_step`, with parameters in files too; `opt_state=None` keeps moments on the device."""
    train_step = jzero.make_train_step(loss, tx or optax.adamw(1e-2), **options)
    place = f"nvme:{where}"
    offload = jzero.Offload(
        opt_state=place if opt_state == "same" else opt_state, params=params or place, bucket_bytes=bucket_bytes,
        fraction=fraction,
    )  # fmt: skip
    return jzero.shard(train_step, stage=3, min_shard_elements=64, offload=offload, mesh=mesh)


def plain_step(**options):
    return jzero.shard(jzero.make_train_step(loss, optax.adamw(1e-2), **options), stage=3, min_shard_elements=64)


@pytest.fixture
def step(tmp_path):
    return make_step(tmp_path / "swap")


@pytest.fixture
def moved(monkeypatch):
    """Bytes that steps read and write, parts of payloads alone."""
    found = {"read": 0, "written": 0}
    read, write = ShardFile.read, ShardFile.write

    def reading(self, slot, at, into, expected):
        found["read"] += min(into.size, self.num_bytes - at)
        read(self, slot, at, into, expected)

    def writing(self, slot, at, part):
        found["written"] += min(part.size, self.num_bytes - at)
        return write(self, slot, at, part)

    monkeypatch.setattr(ShardFile, "read", reading)
    monkeypatch.setattr(ShardFile, "write", writing)
    return found


def on_devices():
    """Shapes of the arrays that are alive on devices; metrics, keys and biases left out."""
    gc.collect()
    return [leaf.shape for leaf in jax.live_arrays() if leaf.size > WIDTH]


def all_in_files(*trees):
    return all(isinstance(leaf, DiskArray) for leaf in jax.tree.leaves(trees))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_between_steps_the_whole_state_is_in_files(tmp_path, moved, precision):
    """Masters that are cast are read twice, others once; all that a step changes is written once."""
    step = make_step(tmp_path / "swap", precision=precision)
    known = on_devices()
    state = step.init(lambda: step.fn.init(make_params()))
    for i in range(3):
        moved |= {"read": 0, "written": 0}
        state, _ = step(state, batch(i))
        assert all_in_files(state.params, state.opt_state[0].mu, state.opt_state[0].nu)
        assert on_devices() == known
        assert moved["read"] == 4 * LEAF_BYTES * (4 if precision == "bf16" else 3)
        assert moved["written"] == 4 * LEAF_BYTES * 3
    state.params["w0"].swap.verify()
    plain = plain_step(precision=precision)
    expected, _ = train(plain, make_state(plain), 3)
    for one, other in zip(numbers(state), numbers(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)  # several programs instead of one, three steps
    found = float(step.evaluate(state, batch())["loss"])
    assert found == pytest.approx(float(plain.evaluate(expected, batch())["loss"]), rel=1e-5)
    del plain, expected, one, other
    assert on_devices() == known  # an evaluation lets go of them too
    state, _ = step(state, batch(4))  # and is no step: the files are those that the state names


def test_parameters_that_do_not_train_are_read_and_never_written(tmp_path, moved):
    trainable = lambda path: path != "w1"
    step = make_step(tmp_path / "swap", trainable=trainable)
    state = make_state(step)
    frozen = shard_file(state.params["w1"])
    before, stamp = np.asarray(state.params["w1"]), frozen.path.stat().st_mtime_ns
    assert frozen.path.stat().st_size * 2 == shard_file(state.params["w0"]).path.stat().st_size  # one slot
    moved |= {"read": 0, "written": 0}
    state, _ = train(step, state, 3)
    assert moved == {"read": 3 * 10 * LEAF_BYTES, "written": 3 * 9 * LEAF_BYTES}
    assert frozen.path.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(state.params["w1"], before)
    swap = state.params["w1"].swap
    swap.verify()
    plain = plain_step(trainable=trainable)
    expected, _ = train(plain, make_state(plain), 3)
    for one, other in zip(numbers(state), numbers(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)
    flip(frozen.path, frozen.header_bytes + 3)
    with pytest.raises(CorruptSwap, match="params/w1"):
        step(state, batch())


@pytest.mark.slow
def test_a_skipped_step_writes_nothing(tmp_path, moved):
    step = make_step(tmp_path / "swap", precision="fp16")
    state, _ = train(step, make_state(step), 1)
    before = numbers(state)
    moved |= {"read": 0, "written": 0}
    state, metrics = step(state, batch() * np.inf)
    assert bool(metrics["skipped"])
    assert moved["written"] == 0
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    state, metrics = step(state, batch())
    assert not bool(metrics["skipped"])


@pytest.mark.parametrize("opt_state", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in ("same", "host"))])
def test_a_step_that_fails_leaves_the_state_of_the_last(tmp_path, small_files, opt_state):
    """A disk that is full in the middle of a step; moments may rest on the device or in host memory beside the files."""
    import resource

    step = make_step(tmp_path / "swap", opt_state=opt_state)
    state, _ = train(step, make_state(step), 1)
    before, unlimited = numbers(state), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    file = shard_file(state.params["w3"])
    small_files(file.slot_bytes - direct.ALIGN)  # generation 2 goes into slot 0: the last block of it does not fit
    with pytest.raises(OSError, match=r"(?s)update 2 could not be written.*after 1 updates is intact"):
        step(state, batch(1))
    small_files(unlimited)
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    state.params["w3"].swap.verify()
    state, _ = train(step, state, 2, first=1)
    assert_same(state, train(step, make_state(step), 3)[0])


@pytest.mark.slow
def test_a_damaged_parameter_fails_the_step_before_it_computes(step):
    state, _ = train(step, make_state(step), 2)
    file = shard_file(state.params["w2"], 3)
    flip(file.path, state.params["w2"].swap.slot(file) * file.slot_bytes + file.header_bytes + 17)
    for run in (step, step.evaluate):
        with pytest.raises(CorruptSwap, match=rf"(?s)not what was written.*{file.path.name}.*params/w2.*Restore a checkpoint"):
            run(state, batch())
    assert not state.params["w0"].is_deleted()
    assert not state.opt_state[0].mu["w0"].is_deleted()


@pytest.mark.slow
def test_parameters_and_moments_of_different_steps_are_found(step):
    first, _ = train(step, make_state(step), 2)
    old, second = first, make_state(step)
    first, _ = train(step, first, 1, first=2)
    with pytest.raises(RuntimeError, match=r"(?s)donated to a step already.*params/w0"):
        step(first._replace(params=old.params), batch())
    with pytest.raises(ValueError, match=r"(?s)swaps of several.*step.place"):
        step(first._replace(params=second.params), batch())
    with pytest.raises(ValueError, match=r"(?s)different steps.*2 updates.*update 3"):
        step(first._replace(step=first.step - 1), batch())
    with pytest.raises(ValueError, match=r"(?s)4 of \d+ state leaves.*params/w0.*on the device.*expected nvme:.*step.place"):
        step(first._replace(params=make_params()), batch())
    with pytest.raises(ValueError, match=r"(?s)4 of \d+ state leaves.*params/w0.*on the device.*expected nvme:.*step.place"):
        step.evaluate(first._replace(params=make_params()), batch())
    train(step, first, 1, first=3)


@pytest.mark.slow
def test_two_folders_keep_a_step_together_or_not_at_all(tmp_path, monkeypatch):
    step = make_step(tmp_path / "moments", params=f"nvme:{tmp_path / 'params'}")
    state, _ = train(step, make_state(step), 2)
    before, commit = numbers(state), Swap.commit
    swaps = {state.params["w0"].swap, state.opt_state[0].mu["w0"].swap}
    assert len(swaps) == 2
    committed = []

    def fails_once_another_has(self, number):
        if committed:
            raise OSError(28, "No space left on device")
        committed.append(self)
        commit(self, number)

    monkeypatch.setattr(Swap, "commit", fails_once_another_has)
    with pytest.raises(OSError, match=r"(?s)update 3 could not be written.*after 2 updates is intact"):
        step(state, batch(2))
    monkeypatch.undo()
    assert committed
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for swap in swaps:
        swap.verify()
        assert (swap.generation, swap.step) == (2, 2)
    state, _ = train(step, state, 2, first=2)
    assert_same(state, train(step, make_state(step), 4)[0])


@pytest.mark.slow
def test_checkpoints_come_from_the_files_and_go_back(tmp_path, step):
    state, _ = train(step, make_state(step))
    manager = jzero.CheckpointManager(tmp_path / "run", step=step)
    manager.save(3, state)
    manager.wait()
    on_device, _ = manager.restore(plain_step())
    assert_same(on_device, state)
    again, _ = manager.restore(step)
    assert all_in_files(again.params)
    assert_same(again, state)
    expected = train(step, state, 2, first=3)[0]
    assert_same(train(step, again, 2, first=3)[0], expected)
    weights, _ = manager.restore(step, weights_only=True)
    assert all_in_files(weights.params, weights.opt_state[0].nu)
    assert not np.asarray(weights.opt_state[0].nu["w1"]).any()
    into, _ = manager.restore(step, weights_only=True, into=expected)
    assert all_in_files(into.params)
    np.testing.assert_array_equal(into.params["w2"], on_device.params["w2"])
    np.testing.assert_array_equal(into.opt_state[0].mu["w2"], expected.opt_state[0].mu["w2"])
    train(step, into, 1, first=5)


@pytest.mark.slow
def test_with_what_else_there_is(tmp_path):
    """`verify`, `offload_states` and back, a state that is shapes alone, `lower`."""
    step = make_step(tmp_path / "swap", precision="bf16")
    state, _ = train(step, make_state(step))
    jzero.verify(step, state, batch(), rtol=0.05)  # of Adam's first steps, where gradients are of bf16
    state = jzero.reload_states(jzero.offload_states(state), step)
    assert int(train(step, state, 1)[0].step) == 4
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    assert step.report(shapes, batch()).offload["brought_bytes"] == 4 * LEAF_BYTES // 8
    given = step.lower(shapes, batch()).in_avals[0][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(given.params)} == {jnp.dtype(jnp.bfloat16)}  # the gradient program's
    assert not any(leaf.shape for leaf in jax.tree.leaves(given.opt_state))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_leaf_larger_than_a_bucket_comes_and_goes_by_rows(tmp_path, precision):
    """In buckets of 2 MiB: what is brought, the update and the pool are of rows."""
    where = f"nvme:{tmp_path}"
    offload, state = by_rows(jzero.Offload(opt_state=where, params=where, bucket_bytes=2**21), precision=precision)
    assert [row["slices"] for row in offload["buckets"]] == [1, 3]
    assert offload["brought_in"] == 2  # the head and a third of the layers, and the rest of them
    assert offload["places"][where]["pool_bytes"] == 4 * 3 * 2**20  # of four lanes, each a third of three arrays of 3 MiB
    state.params["layers"].swap.verify()


@pytest.mark.parametrize(("precision", "held"), [("bf16", 0), pytest.param("fp32", 4, marks=pytest.mark.slow)])
def test_the_report_says_what_comes_and_what_stays(tmp_path, precision, held):
    step, where = make_step(tmp_path / "swap", precision=precision), f"nvme:{tmp_path / 'swap'}"
    report = step.report(jax.eval_shape(lambda: step.fn.init(make_params())), batch())
    assert report.bytes_at_rest["params"] == {"measured": 0, "formula": 0}
    assert {row["memory"] for row in report.leaves if row["role"] == "params"} == {where}
    per_device = 4 * LEAF_BYTES // 8
    assert report.offload["at_rest"][where] == 3 * per_device
    assert (report.offload["brought_bytes"], report.offload["moved_bytes"]) == (per_device, 3 * per_device)
    assert report.offload["held_bytes"] == held * per_device // 4
    assert report.offload["file_bytes"] == 6 * per_device
    assert "brought from files" in str(report)
