"""Plans by the compilers: figures that are kept, steps of one's own, what a machine lacks."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from jzero.doctor.diagnosis import doctor, missing
from jzero.plan import cache, compiled, fit, refused
from jzero.plan.job import make
from jzero.plan.planned import plan_job

# A step at the top level of a file; what a program makes of its arguments is planned by the model's name.
EXAMPLES = sorted(file for file in (Path(__file__).parent.parent / "examples").glob("*.py") if file.stem != "pretrain")


def test_compiled_figures_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def answer(module, request, *, what):
        asked.append(request)
        return {"peak_bytes": 1}

    monkeypatch.setattr(compiled, "ask", answer)
    job = make("gpt2-tiny", "h100:1x2")
    assert compiled.compile_job(job) == compiled.compile_job(job) == {"peak_bytes": 1}
    assert len(asked) == 1
    compiled.compile_job(job._replace(stage=1))
    assert len(asked) == 2
    next(cache.folder().glob("*.json")).write_text("{torn")
    compiled.compile_job(job), compiled.compile_job(job._replace(stage=1))
    assert len(asked) == 3


def test_changes_are_compiled_until_one_fits(monkeypatch):
    job = make("llama-8b", "a100-40:2x8", stage=0, seq=2048)
    peaks = iter([10**12, 10**9, 0])
    monkeypatch.setattr(compiled, "compile_job", lambda one: {"peak_bytes": next(peaks)})
    wanted = fit.changes(job)
    found = fit.compiled_changes(wanted, limit=4 * 10**10)
    assert found[0].flags == wanted[1].flags
    assert found[0].compiled_peak_bytes == 10**9
    assert wanted[0].flags not in [one.flags for one in found]


# libtpu 0.0.51, llama-1b at stage 0 for v5e:4x4.
REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(22.12G) exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_a_refusal_for_size_is_an_answer():
    found = refused.figures(REFUSAL, 10**9)
    assert found["peak_bytes"] == int(22.12 * 2**30) + 10**9
    assert refused.figures("INTERNAL: something else", 0) is None


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys.modules["jzero.topology"], "_version", lambda wheel: None)
    with pytest.raises(NotImplementedError, match=r"pip install 'jzero\[compile\]'"):
        jzero.plan(lambda w, x: (w, None), jnp.ones(4), jnp.ones(16), target="h100:2x8")


def test_a_process_that_dies_is_explained(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('my own mistake')\n")
    with pytest.raises(compiled.CannotCompile, match="my own mistake"):
        compiled.plan_file(str(file), "step", target="h100:2x8")


def test_a_file_without_a_state_is_explained(tmp_path):
    file = tmp_path / "bare.py"
    file.write_text("step = len\nwindow = 1\n")
    with pytest.raises(compiled.CannotCompile, match="no 'state'"):
        compiled.plan_file(str(file), "step", target="h100:2x8")


@pytest.mark.compile
def test_a_step_of_ones_own():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), None

    plan = jzero.plan(step, jnp.ones((64, 64)), jnp.ones((16, 64)), target="h100:2x8")
    assert plan.fits
    assert plan.compiled["at_rest"]["params"] == 64 * 64 * 4 // 16
    assert plan.job["stage"] == 3
    json.dumps(plan.to_dict())
    with pytest.raises(ValueError, match="24"):
        jzero.plan(step, jnp.ones((64, 64)), jnp.ones((24, 64)), target="h100:2x8")


@pytest.mark.compile
def test_search_over_a_step_of_ones_own():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), None

    plan = jzero.plan(step, jnp.ones((64, 64)), jnp.ones((16, 64)), target="h100:2x8", search=True)
    assert [row["stage"] for row in plan.search["rows"]] == [0, 1, 2, 3]
    assert plan.search["winner"] == plan.job["stage"] == 0  # everything fits, and stage 0 moves least
    json.dumps(plan.to_dict())


@pytest.mark.slow
@pytest.mark.compile
def test_a_tpu_program_that_is_too_large_is_a_plan():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.sin(x @ w) ** 2))(w), None

    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8192, 8192), (2**22, 8192)))
    plan = jzero.plan(step, w, x, target="v5e:2x2", stage=0)
    assert not plan.fits
    assert plan.missing_bytes > 2**30
    assert "Does not fit" in str(plan)


@pytest.mark.compile
def test_a_step_of_jzero_keeps_its_stage_and_takes_a_key():
    train_step = jzero.make_train_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), optax.adam(1e-3))
    sharded = jzero.shard(train_step, stage=1)
    state = sharded.init(train_step.init, lambda: {"w": jnp.ones((64, 64))})
    plan = jzero.plan(sharded, state, jnp.ones((16, 64)), target="h100:2x8")
    assert (plan.job["stage"], plan.job["mesh"]) == (1, {"data": 16})
    assert plan.compiled["at_rest"]["opt_state"] == pytest.approx(2 * 64 * 64 * 4 / 16, abs=8)  # and Adam's count


@pytest.mark.compile
def test_a_step_that_wants_a_value_is_explained():
    def step(w, x):
        return (w if x.sum() > 0 else -w), None

    with pytest.raises(TypeError, match=r"looks at a value.*\n.*test_plan_compiled.py:\d+ \(step\): return \(w if x.sum"):
        jzero.plan(step, jnp.ones((64, 64)), jnp.ones((16, 64)), target="h100:2x8")


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("target", ["h100:2x8", "v5e:4x4"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_planned_with_one_command(example, target, tmp_path):
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "jzero.plan", f"{example}:step", "--target", target, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["fits"]


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_and_closed_side_by_side():
    plan = plan_job(make("llama-1b", "h100:2x8", seq=2048))
    assert plan.compiled["at_rest"]["params"] == plan.closed["at_rest"]["params"]
    assert abs(plan.closed["peak_bytes"] / plan.compiled["peak_bytes"] - 1) < 0.10
    assert "apart" in str(plan)


def test_doctor_measures_this_machine():
    found = doctor()
    assert len(found.devices) == jax.local_device_count()
    assert 1e7 < found.host_to_device < 1e13
    assert found.devices[0]["memory_kinds"]
    assert "Host to device" in str(found)
    assert found.host_bytes > 2**30
    assert found.device_to_device is not None  # eight simulated devices
    assert found.device_to_device > 0
    assert "Device to device" in str(found)
    json.dumps(found.to_dict())


def test_doctor_names_the_extra():
    lines = missing({"libtpu": None, "jax-cuda13-plugin": "1", "jax-cuda13-pjrt": "1"}, {"TPU": "no wheel", "CUDA": "works"})
    assert len(lines) == 1
    assert "libtpu" in lines[0]
    assert "jzero[compile]" in lines[0]
