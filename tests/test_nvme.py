"""The NVMe tier: files that are whole or named as damaged, and steps that fail and leave the state."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jzero
from jzero.offload.nvme import direct, folder, swap
from jzero.offload.nvme.array import DiskArray
from jzero.offload.nvme.shard_file import CorruptSwap, part_bytes

WIDTH = 64
ROOM_BYTES = 20_000  # less than a swap file of one slot and its header, more than any header


def loss(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - 1) ** 2)


def make_params(num=4):
    keys = jax.random.split(jax.random.key(1), num)
    return {f"w{i}": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for i, key in enumerate(keys)}


def batch(i=0):
    return np.random.default_rng((3, i)).normal(size=(8, WIDTH)).astype(np.float32)


def make_step(where, *, tx=None, stage=3, bucket_bytes=4096, mesh=None, **options):
    """A bucket of two moments each."""
    train_step = jzero.make_train_step(loss, tx or optax.adamw(1e-2), **options)
    offload = None if where is None else jzero.Offload(opt_state=f"nvme:{where}", bucket_bytes=bucket_bytes)
    return jzero.shard(train_step, stage=stage, min_shard_elements=64, offload=offload, mesh=mesh)


def make_state(step):
    return step.place(step.fn.init(make_params()))


def train(step, state, num=3, first=0):
    for i in range(first, first + num):
        state, metrics = step(state, batch(i))
    return state, float(metrics["loss"])


def numbers(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state, state.step))]


def assert_same(left, right):
    for one, other in zip(numbers(left), numbers(right), strict=True):
        np.testing.assert_array_equal(one, other)


def files(state):
    return sorted({path for leaf in jax.tree.leaves(state.opt_state) if isinstance(leaf, DiskArray) for path in leaf.files})


@pytest.fixture
def step(tmp_path):
    return make_step(tmp_path / "swap")


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


# Damage and mix-ups ---------------------------------------------------------------------------------------------------


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def shard_file(leaf, number=0):
    return leaf.swap.files[leaf.index][number]


@pytest.mark.parametrize(
    "damage", ["flipped", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("missing", marks=pytest.mark.slow)]
)
def test_a_damaged_file_fails_the_step_and_is_named(step, damage):
    state, _ = train(step, make_state(step), 2)
    leaf = state.opt_state[0].nu["w2"]
    file, params = shard_file(leaf, 5), np.asarray(state.params["w2"])
    payload = leaf.swap.slot * file.slot_bytes + file.header_bytes
    if damage == "flipped":
        flip(file.path, payload + 17)
    elif damage == "truncated":
        os.truncate(file.path, payload + 4096 * 0)
    else:
        file.path.unlink()
    with pytest.raises(CorruptSwap, match=rf"(?s)not what was written.*{file.path.name}.*nu/w2.*Restore a checkpoint"):
        step(state, batch())
    np.testing.assert_array_equal(state.params["w2"], params)  # not donated: the step failed
    assert not state.opt_state[0].mu["w0"].is_deleted()
    with pytest.raises(CorruptSwap):
        np.asarray(leaf)
    with pytest.raises((CorruptSwap, FileNotFoundError)):
        leaf.swap.verify()


def test_a_swap_opens_again_only_as_it_was_left(tmp_path, step):
    state, _ = train(step, make_state(step), 3)
    made = state.opt_state[0].mu["w0"].swap
    found = swap.opened(made.folder, made.leaves)
    assert (found.generation, found.step) == (3, 3)
    file = made.files[0][0]
    copy = tmp_path / "copy"

    def damaged(change):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made.folder, copy)
        change(copy / file.path.name)

    slot_of_the_past = ((found.slot + 1) % 2) * file.slot_bytes
    damaged(lambda path: flip(path, slot_of_the_past + file.header_bytes))
    swap.opened(copy, made.leaves)  # a flip in the slot that does not count harms nobody
    for change in (
        lambda path: flip(path, found.slot * file.slot_bytes + 60),
        lambda path: flip(path, found.slot * file.slot_bytes + file.header_bytes),
        lambda path: flip(path.parent / swap.COMMIT, 40),
        lambda path: (path.parent / swap.COMMIT).unlink(),
        lambda path: os.truncate(path, file.slot_bytes),
        lambda path: shutil.copy(made.files[0][1].path, path),  # another shard's file
    ):
        damaged(change)
        with pytest.raises((CorruptSwap, FileNotFoundError)):
            swap.opened(copy, made.leaves)
    with pytest.raises(ValueError, match="another run"):
        swap.opened(made.folder, made.leaves[:-1])


@pytest.mark.slow
def test_generations_are_never_mixed(step):
    """One file of the generation before, under the name of this one."""
    state, _ = train(step, make_state(step), 3)
    made = state.opt_state[0].mu["w0"].swap
    file = made.files[2][3]
    with file.path.open("r+b") as opened:
        content = opened.read()
        old, new = (slot * file.slot_bytes for slot in (made.next_slot, made.slot))
        opened.seek(new)
        opened.write(content[old : old + file.slot_bytes])
    with pytest.raises(CorruptSwap, match=r"generation 2 of step 2, committed is generation 3 of step 3"):
        swap.opened(made.folder, made.leaves)
    with pytest.raises(CorruptSwap):
        step(state, batch())


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Sets a limit on the size of files: what a full disk or a quota does, at the moment that a test wants it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_in_the_middle_of_a_step(step, small_files):
    """Every state is good after the failure: the files' generation, the parameters on the device, the next step."""
    state, _ = train(step, make_state(step), 1)
    before, unlimited = numbers(state), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    file = shard_file(state.opt_state[0].mu["w3"])
    small_files(file.slot_bytes - direct.ALIGN)  # generation 2 goes into slot 0: the last block of it does not fit
    with pytest.raises(OSError, match=r"(?s)update 2 could not be written.*too large.*after 1 updates is intact.*repeat"):
        step(state, batch(1))
    small_files(unlimited)
    for one, other in zip(numbers(state), before, strict=True):
        np.testing.assert_array_equal(one, other)
    state.opt_state[0].mu["w3"].swap.verify()
    state, _ = train(step, state, 2, first=1)
    assert_same(state, train(step, make_state(step), 3)[0])


def test_a_disk_without_room_is_found_before_anything_is_made(tmp_path, monkeypatch):
    step = make_step(tmp_path / "swap")
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"(?s)the swap needs [\d,]+ bytes and 100,000 are free.*two generations.*fraction=0\.\d\d"
    ):
        make_state(step)
    assert not list((tmp_path / "swap").rglob("*.bin"))


def test_a_quota_is_found_when_files_are_made(step, small_files):
    small_files(ROOM_BYTES)
    with pytest.raises(OSError, match=r"(?s)the swap's disk could not be tried.*too large.*larger disk"):
        make_state(step)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"(?s)cannot write into the swap folder.*file.*local drive"):
        make_state(make_step(tmp_path / "file" / "swap"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write into the swap folder"):
        make_state(make_step(tmp_path / "swap"))


def test_a_slow_disk_is_said_with_the_time_it_takes(tmp_path, monkeypatch):
    ticks = iter(range(100))
    speed = folder.measure(tmp_path, 2**20, clock=lambda: next(ticks))  # a second for each way
    assert speed.write_bytes_per_s == speed.read_bytes_per_s == 2**20
    assert speed.seconds(2**22) == pytest.approx(8)
    assert not (tmp_path / "trial").exists()
    with pytest.warns(UserWarning, match=r"(?s)this disk is slow: each step will wait at least 8.0 s.*writes 1 MB/s"):
        folder.warn_if_slow(tmp_path, speed, 2**22)
    monkeypatch.setattr(folder, "measure", lambda path, num_bytes: folder.Speed(10.0, 10.0, True))
    with pytest.warns(UserWarning, match="this disk is slow"):
        make_state(make_step(tmp_path / "swap"))


@pytest.mark.slow
def test_a_file_system_without_direct_io(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *mode, **options):
        if flags & direct._O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(direct.os, "open", refuse)
    assert not folder.measure(tmp_path, 4096).is_direct
    step = make_step(tmp_path / "swap")
    state, _ = train(step, make_state(step), 2)
    state.opt_state[0].mu["w0"].swap.verify()


# Runs -----------------------------------------------------------------------------------------------------------------

OTHER_RUN = """
import sys; sys.path[:0] = [{tests!r}]
import test_nvme as t
step = t.make_step({where!r})
state, _ = t.train(step, t.make_state(step), 2)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that has trained two steps with its swap in `tmp_path / "swap"`."""
    script = OTHER_RUN.format(tests=str(Path(__file__).parent), where=str(tmp_path / "swap"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_swap_folder_of_another_run(tmp_path, other_run, step):
    with pytest.raises(BlockingIOError, match=rf"(?s)swap folder of another run.*in use by process {other_run.pid}"):
        make_state(step)
    other_run.kill()
    other_run.wait()
    (left,) = folder.leftovers(tmp_path / "swap" / "process-0", set())
    assert left.said == "8 leaves at step 2"
    smaller = jzero.make_train_step(loss, optax.adamw(1e-2))
    smaller = jzero.shard(smaller, stage=3, offload=jzero.Offload(opt_state=f"nvme:{tmp_path / 'swap'}"))
    with pytest.raises(ValueError, match=r"(?s)swap folder of another run.*8 leaves at step 2.*Name another folder, or delete"):
        smaller.place(smaller.fn.init(make_params(2)))
    assert left.folder.exists()
    make_state(step)  # the same leaves: this run takes over from the one that died
    assert not left.folder.exists()
    (finding,) = [line for line in step.report(make_state(step), batch()).findings if "taken over" in line]
    assert "8 leaves at step 2" in finding


def test_settings_without_effect_or_meaning(tmp_path):
    train_step = jzero.make_train_step(loss, optax.adamw(1e-2))
    nvme = f"nvme:{tmp_path}"
    with pytest.raises(NotImplementedError, match=r"(?s)params=.*nvme.*opt_state="):
        jzero.shard(train_step, stage=3, offload=jzero.Offload(params=nvme))
    with pytest.raises(ValueError, match=r"(?s)donate=False.*nvme"):
        jzero.shard(train_step, stage=3, donate=False, offload=jzero.Offload(opt_state=nvme))


# Large leaves ---------------------------------------------------------------------------------------------------------


def test_a_leaf_larger_than_a_bucket_goes_by_rows(tmp_path):
    """Stacked layers, 3 MiB a moment, in buckets of 2 MiB: the numbers of the whole, in a pool of slices."""

    def stacked_loss(params, x):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((out @ params["head"]) ** 2)

    params = {"layers": jax.random.normal(jax.random.key(0), (12, 256, 256)) / 16, "head": jnp.ones((256, 8))}
    mesh = jzero.make_mesh(devices=jax.devices()[:1])
    x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)

    def run(offload, num):
        train_step = jzero.make_train_step(stacked_loss, optax.adamw(1e-3), accumulate=2, clip_norm=0.1)
        step = jzero.shard(train_step, stage=3, mesh=mesh, offload=offload)
        state = step.place(train_step.init(params))
        for _ in range(num):
            state, metrics = step(state, x)
        return step, state, float(metrics["loss"])

    where = f"nvme:{tmp_path}"
    sliced = jzero.Offload(opt_state=where, bucket_bytes=2**21)
    _, expected, _ = run(None, 1)
    step, state, _ = run(sliced, 1)
    for one, other in zip(numbers(state), numbers(expected), strict=True):
        assert np.max(np.abs(one - other)) <= 2 * np.spacing(np.float32(np.max(np.abs(other))))  # as the law of parity
    for _ in range(3):
        state, metrics = step(state, x)
    assert float(metrics["loss"]) == pytest.approx(run(None, 4)[2], rel=1e-4)
    offload = step.report(state, x).offload
    assert [row["slices"] for row in offload["buckets"]] == [1, 3]
    assert offload["places"][where]["pool_bytes"] == 4 * 2 * 2**20  # of four lanes, each a third of two moments of 3 MiB
    state.opt_state[0].mu["layers"].swap.verify()


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
