"""The bench: bad words are explained before anything starts, and what it prints and writes is what API.md promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jzero.bench import contenders, main, options, peak, setup, start, table, training
from jzero.bench import plot as plots

# API.md, "The bench's JSON".
PROMISED = {
    "model", "stage", "mesh", "precision", "loss_first", "loss_last", "step_time_ms", "tokens_per_s_per_device",
    "mfu", "flops_formula", "bytes_at_rest", "wire_bytes", "peak_bytes",
}  # fmt: skip
TINY = "--batch 8 --seq 16 --steps 2"


def quiet():
    return Console(quiet=True)


def make_setup(words):
    parsed = options.parse(words.split())
    return setup.resolve(parsed, jax.devices()[: parsed.devices])


@pytest.fixture(scope="module")
def found():
    words = f"{TINY} --stage 3".split()
    result = main.bench(setup.resolve(options.parse(words), jax.devices()), quiet(), words=words)
    return json.loads(json.dumps(result))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model gpt2-134m", "Did you mean 'gpt2-124m'"),
        ("--stage 0,4", "stages are 0, 1, 2, 3"),
        ("--stage three", "'three'"),
        ("--mesh data:4", "'data:4'"),
        ("--mesh data=0", "sizes positive"),
        ("--mesh replicas=2", "Did you mean 'replica'"),
        ("--mesh expert=2", "gpt2-tiny has no experts"),
        ("--precision bf17", "Did you mean 'bf16'"),
        ("--remat dot", "Did you mean 'dots'"),
        ("--steps 0", "--steps 0"),
        ("--no-plain --stage ,", "nothing to run"),
    ],
)
def test_bad_words_are_explained(words, message):
    with pytest.raises(ValueError, match=message):
        options.parse(words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 12", "Use --batch 8 or 16"),
        ("--batch 8 --accumulate 4", "multiple of 32"),
        ("--seq 1000", "Use --seq 256"),
        ("--mesh data=16", "does not fit 8 devices"),
        ("--data nowhere.txt", "no such file"),
        ("--mesh sequence=4,data=2 --seq 100", "Use --seq 96 or 104"),
        ("--mesh sequence=2,data=4 --seq 33", "Use --seq 32 or 34"),
        ("--mesh tensor=4,data=2", "a size among 1, 2, 3, 6"),
        ("--mesh pipe=2,sequence=2,data=2", "cannot split the sequence too"),
    ],
)
def test_what_does_not_fit_is_explained(words, message):
    with pytest.raises(ValueError, match=message):
        make_setup(words)


def test_main_prints_the_message_and_fails(capsys):
    assert main.main(["--model", "gpt3"]) == 2
    assert "unknown model" in capsys.readouterr().err


def test_defaults_follow_the_devices():
    chosen = make_setup("")
    assert (chosen.num_devices, chosen.batch, chosen.seq, chosen.precision) == (8, 16, 128, "fp32")
    assert make_setup("--mesh data=2,replica=2 --accumulate 2").batch == 16
    assert dict(make_setup("--mesh data=2,replica=2").mesh.shape) == {"replica": 2, "data": 2}
    assert make_setup("--model gpt2-124m").model.config.padded_vocab_size == 50304


def test_simulation_adds_devices_and_keeps_what_the_user_set():
    environ = start.simulation_environment({"XLA_FLAGS": "--a=1", "MALLOC_ARENA_MAX": "2"}, 4)
    assert environ["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=4"
    assert (environ["MALLOC_ARENA_MAX"], environ["JAX_PLATFORMS"]) == ("2", "cpu")
    own = "--xla_force_host_platform_device_count=3"
    assert start.simulation_environment({"XLA_FLAGS": own}, 4)["XLA_FLAGS"] == own


def test_json_is_what_is_promised(found):
    assert {"runs", "device", "versions", "command"} <= set(found)
    assert [run["stage"] for run in found["runs"]] == [None, 3]
    for run in found["runs"]:
        assert set(run) >= PROMISED
        assert set(run["step_time_ms"]) == {"median", "min", "max"}
        for figure in run["bytes_at_rest"].values():
            assert set(figure) == {"measured", "formula"}
        for kinds in run["wire_bytes"].values():
            assert all(set(figure) == {"measured", "formula"} for figure in kinds.values())


def test_contenders_agree_and_meet_their_formulas(found):
    plain, three = found["runs"]
    np.testing.assert_allclose(three["losses"], plain["losses"], rtol=1e-5)
    for run in (plain, three):
        for role in ("params", "opt_state"):
            assert run["bytes_at_rest"][role]["measured"] == run["bytes_at_rest"][role]["formula"]
    assert three["bytes_at_rest"]["params"]["measured"] < plain["bytes_at_rest"]["params"]["measured"] / 7
    assert found["shared"]["num_params"] == 2_767_872


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sequence=2,data=2", "sequence=4,data=2", "pipe=2,data=2,tensor=2"])
def test_further_axes_train_with_one_devices_loss(mesh):
    """Plain JAX beside stage 3: an exchange of heads, a ring where 4 does not divide 6 heads, a pipeline of pieces."""
    words = f"--batch 8 --seq 16 --steps 3 --stage 3 --mesh {mesh}".split()
    sizes = options.parse(words).mesh.values()
    result = main.bench(setup.resolve(options.parse(words), jax.devices()[: int(np.prod(list(sizes)))]), quiet(), words=words)
    plain, three = result["runs"]
    np.testing.assert_allclose(three["losses"], plain["losses"], rtol=1e-5)
    assert three["bytes_at_rest"]["params"]["measured"] == three["bytes_at_rest"]["params"]["formula"]


def test_table_and_picture_show_every_run(found, tmp_path):
    console = Console(width=150, record=True, quiet=False, file=(tmp_path / "table.txt").open("w"))
    console.print(table.table(found))
    text = console.export_text()
    console.file.close()
    for word in ("plain JAX", "stage 3", "median [min..max]", "at rest: params", "wire, data: all-gather", "MFU"):
        assert word in text
    plots.plot(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_plain_step_is_the_same_training():
    """The hand-written step against jzero's own unsharded one: same loss, same parameters."""
    import jzero

    chosen = make_setup("--seq 16 --batch 16 --accumulate 2 --precision bf16 --remat full")
    tokens = next(setup.batches(chosen))
    params = chosen.model.init(jax.random.key(0))
    (after, _), loss = jax.jit(contenders.plain_step(chosen))((params, chosen.optimizer.init(params)), tokens)
    step = jzero.make_train_step(
        chosen.model.loss, chosen.optimizer, precision=chosen.precision, accumulate=chosen.options.accumulate
    )
    state, metrics = jax.jit(step)(step.init(params), tokens)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-5)
    moved = [jnp.linalg.norm(a - b) for a, b in zip(*map(jax.tree.leaves, (after, params)), strict=True)]
    apart = [jnp.linalg.norm(a - b) for a, b in zip(*map(jax.tree.leaves, (after, state.params)), strict=True)]
    assert sum(apart) < 0.02 * sum(moved)


def test_first_steps_are_not_timed():
    assert training.timed([9.0, 8.0, 1.0, 2.0]) == [1.0, 2.0]
    assert training.timed([9.0]) == [9.0]
    assert training.milliseconds([9.0, 8.0, 1.0, 3.0]) == {"median": 2000.0, "min": 1000.0, "max": 3000.0}


def test_peak_of_simulated_devices_is_shared():
    found = peak.peak(jax.devices())
    assert found.flops > 0
    assert "8 devices" in found.source
