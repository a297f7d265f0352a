"""Plans: the closed form against real parameters and against figures that the compilers gave, and every way to ask for one."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from benchmarks import plan_grid
from jzero import models
from jzero.doctor.diagnosis import doctor, missing
from jzero.plan import cache, closed, compiled, facts, fit, machine, refused, search
from jzero.plan.job import count, make
from jzero.plan.main import main
from jzero.plan.planned import plan_job
from jzero.plan.times import times
from jzero.topology import parse
from jzero.topology_specs import GPUS, TPUS

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

# What the compilers made of sixty configurations, as benchmarks/plan_grid.py stored it: measured, not copied by hand.
GRID = json.loads(max((Path(__file__).parent.parent / "benchmarks" / "results").glob("*-plan-grid.json")).read_text())["rows"]
COMPILED = {line: row for line, row in GRID.items() if "error" not in row}


@pytest.mark.parametrize("name", [name for name in models.PRESETS if not name.startswith("mixtral")])
def test_shapes_are_those_of_the_model(name):
    model = models.build(name)
    assert closed.num_params(model.config) == model.num_params
    assert closed.flops_per_token(model.config, 512) == pytest.approx(model.flops_per_token(512), rel=1e-12)


def test_what_has_no_closed_form_is_refused():
    with pytest.raises(NotImplementedError, match=r"knows no experts\n  --model mixtral-8x7b: 8 experts\n.*jzero.plan\(step"):
        make("mixtral-8x7b", "h100:1x8")


def test_closed_form_meets_the_compilers():
    apart = {line: plan_grid.apart(line, row) for line, row in COMPILED.items()}
    beyond = {line: by for line, by in apart.items() if abs(by) > plan_grid.TOLERANCE}
    assert len(beyond) <= 0.1 * len(apart), beyond


@pytest.mark.parametrize("line", COMPILED)
def test_what_rests_and_what_moves_is_exact(line):
    job = plan_grid.job_of(line)
    need, found = closed.memory(job), closed.wire(job).get("data", {})
    for role in ("params", "opt_state", "batch"):
        assert need.at_rest[role] == pytest.approx(COMPILED[line]["at_rest"][role], abs=64)  # and the optimizer's count
    for kind, size in COMPILED[line]["wire"].get("data", {}).items():
        assert found.get(kind, 0) == pytest.approx(size, rel=2e-3, abs=1e6), kind  # and scalars: the loss, the norm


def test_at_rest_is_the_table_of_stages():
    sizes = [closed.memory(make("llama-1b", "h100:2x8", stage=stage)).at_rest for stage in range(4)]
    whole = closed.num_params(make("llama-1b", "h100:2x8").config)
    assert (sizes[0]["params"], sizes[0]["opt_state"]) == (4 * whole, 8 * whole)
    for size in sizes[1:]:
        assert size["params"] + size["opt_state"] == pytest.approx(12 * whole / 16, rel=1e-3)  # every leaf divides by 16


def test_replica_adds_one_reduction_of_the_shard():
    job = make("llama-1b", "h100:2x8", mesh={"replica": 2, "data": 8})
    assert closed.wire(job)["replica"] == {"all-reduce": pytest.approx(4 * closed.num_params(job.config) / 8, rel=1e-3)}


def test_closed_form_takes_less_than_a_second():
    start = time.perf_counter()
    plan_job(make("llama-405b", "v5p:16x16x16", batch=8192, seq=8192), compile_too=False)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("target", [*TPUS, *GPUS])
def test_every_accelerator_has_facts_with_sources(target):
    known = facts.FACTS[target]
    assert all(value > 0 for value in (*known.peak.values(), known.memory_bandwidth, known.link, known.network))
    assert set(known.source) == set(known._fields) - {"source"}


@pytest.mark.parametrize(("target", "number"), {"v5e:16x16*2": 512, "tpu7x:2x2x1": 8, "h100:2x8": 16}.items())
def test_devices_are_counted_without_a_compiler(target, number):
    assert facts.num_devices(parse(target)) == number


def test_a_ring_over_hosts_is_as_fast_as_their_ports():
    target = parse("h100:16x8")
    assert facts.ring_bandwidth(target, 8, 1) == 450e9
    assert facts.ring_bandwidth(target, 128, 1) == 8 * 50e9
    assert facts.ring_bandwidth(target, 16, 8) == 50e9  # one member per host, one port


def test_time_is_bounded_by_the_peak_and_falls_with_work():
    full, none = (times(make("llama-8b", "h100:8x8", remat=remat)) for remat in ("full", "none"))
    assert full.mfu < none.mfu <= facts.MATMUL_FRACTION
    job = make("llama-8b", "h100:8x8")
    attention = 1 - closed.flops_per_token(job.config, 0) / closed.flops_per_token(job.config, job.seq)
    # cuDNN computes half of attention's forward pass again; a whole forward pass comes on top under "full".
    assert full.compute_s / none.compute_s == pytest.approx((1 + 1 / 3 + attention / 6) / (1 + attention / 6))
    dots = times(make("llama-8b", "h100:8x8", remat="dots"))
    assert none.compute_s < dots.compute_s < full.compute_s


def test_what_does_not_fit_says_what_is_missing_and_what_would_help():
    plan = plan_job(make("llama-8b", "h100:2x8", stage=1, seq=2048, batch=64), compile_too=False)
    assert plan.missing_bytes == plan.peak_bytes - plan.usable_bytes or plan.fits
    small = plan_job(make("llama-8b", "a100-40:2x8", stage=0, seq=2048), compile_too=False)
    assert not small.fits
    assert small.missing_bytes == small.peak_bytes - small.usable_bytes > 0
    assert all(change["peak_bytes"] <= small.usable_bytes for change in small.changes)
    assert "--stage 3" in [change["flags"] for change in small.changes]
    assert "Does not fit" in str(small)
    assert "Would fit" in str(small)
    json.dumps(small.to_dict())


def test_what_nothing_saves_is_said():
    plan = plan_job(make("llama-405b", "v5e:4x4", stage=3), compile_too=False)
    assert not plan.fits
    assert not fit.changes(make("llama-405b", "v5e:4x4", stage=3))
    assert "more or larger devices" in str(plan)


def test_search_keeps_the_front_and_writes_python():
    job = make("llama-8b", "h100:1x8", seq=4096, batch=32)
    found = search.search(job, compile_best=0)
    steps, peaks = ([row[key] for row in found["rows"]] for key in ("step_s", "peak_bytes"))
    assert steps == sorted(steps)
    assert peaks == sorted(peaks, reverse=True)
    every = [search.row_of(one) for one in search.candidates(job)]
    fitting = [row for row in every if row["peak_bytes"] <= found_limit(job)]
    assert found["winner"]["step_s"] == min(row["step_s"] for row in fitting)


def found_limit(job):
    return plan_job(job, compile_too=False).usable_bytes


def test_the_winner_can_be_pasted(capsys):
    job = make("gpt2-tiny", "h100:1x8", seq=32)
    found = search.search(job, compile_best=0)["winner"]["job"]
    pasted: dict = {}
    exec(search.python_of(found), pasted)  # on the eight simulated devices of the tests
    tokens = jnp.zeros((found["batch"], found["seq"] + 1), jnp.int32)
    _, metrics = pasted["step"](pasted["state"], tokens)
    assert jnp.isfinite(metrics["loss"])


def test_search_varies_the_batch_if_none_is_given():
    job = make("llama-1b", "h100:1x8", seq=2048)
    every = list(search.candidates(job, vary_batch=True))
    assert len({one.batch for one in every}) > 4
    assert all(one.batch == one.micro_sequences * one.accumulate * one.num_shards for one in every)
    assert {one.batch for one in search.candidates(job)} == {job.batch}


def test_prices(capsys):
    assert search.dollars_per_1e9_tokens(3.6, 1000.0) == pytest.approx(1000.0)  # 0.001 dollars a second for 1,000 tokens
    assert (
        main(["--model", "llama-1b", "--target", "h100:1x8", "--seq", "2048", "--search", "--closed-form-only", "--price", "2"])
        == 0
    )


def test_compilers_side_by_side_fit_the_memory():
    assert machine.num_compilers(1) == 1
    assert machine.num_compilers(machine.COMPILER_BYTES * 1000) == os.cpu_count()
    assert machine.free_bytes() > 2**20


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
    found = fit.compiled_changes(wanted, room=4 * 10**10)
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


def test_search_replaces_a_winner_that_the_compiler_refutes(monkeypatch):
    job = make("llama-8b", "h100:1x8", seq=4096, batch=32)
    fastest = search.search(job, compile_best=0)["winner"]["job"]

    def too_large_first(one):
        return {"peak_bytes": 10**12 if one.to_dict() == fastest else 10**9}

    monkeypatch.setattr(compiled, "compile_job", too_large_first)
    found = search.search(job, compile_best=1)
    assert found["rows"][0]["compiled_peak_bytes"] == 10**12
    assert found["winner"]["job"] != fastest


def test_tokens_are_counted_in_powers_of_1024():
    assert (count("64M"), count("4k"), count("8192"), count("1.5k")) == (64 * 2**20, 4096, 8192, 1536)
    assert make("llama-405b", "v5p:16x16x16", seq=8192, tokens_per_batch=count("64M")).batch == 8192


BAD = {
    "model": (["--model", "lama-8b", "--target", "h100:1x8"], "Did you mean 'llama-8b'"),
    "target": (["--model", "llama-8b", "--target", "h10:1x8"], "Did you mean 'h100'"),
    "grid": (["--model", "llama-8b", "--target", "v5p:4x4"], "v5p takes 3 sizes"),
    "batch": (["--model", "llama-8b", "--target", "h100:1x8", "--batch", "9"], "multiple of 8 sequences"),
    "tokens": (["--model", "llama-8b", "--target", "h100:1x8", "--tokens-per-batch", "64Q"], "not a number of tokens"),
    "mesh": (["--model", "llama-8b", "--target", "h100:1x8", "--mesh", "data=3"], "--mesh replica=1,data=8"),
    "axis": (["--model", "llama-8b", "--target", "h100:1x8", "--mesh", "datta=8"], "Did you mean 'data'"),
    "remat": (["--model", "llama-8b", "--target", "h100:1x8", "--remat", "ful"], "Did you mean 'full'"),
    "precision": (["--model", "llama-8b", "--target", "h100:1x8", "--precision", "bf61"], "Did you mean 'bf16'"),
    "length": (["--model", "gpt2-124m", "--target", "h100:1x8", "--seq", "2048"], "at most 1024 tokens"),
    "nothing": (["--target", "h100:1x8"], "one thing to plan"),
    "price": (["--model", "llama-8b", "--target", "h100:1x8", "--price", "-1"], "amounts must be positive"),
    "nothing to split": (["--model", "llama-8b", "--target", "h100:1x8", "--mesh", "data"], "a mesh is axis=size"),
    "file": (["nowhere.py:step", "--target", "h100:1x8"], "a file that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case, capsys):
    words, said = BAD[case]
    assert main([*words, "--closed-form-only"]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys.modules["jzero.topology"], "_version", lambda wheel: None)
    with pytest.raises(NotImplementedError, match=r"pip install 'jzero\[compile\]'"):
        jzero.plan(lambda w, x: (w, None), jnp.ones(4), jnp.ones(16), target="h100:2x8")


def test_the_command_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["--model", "gpt2-tiny", "--target", "h100:1x2", "--closed-form-only", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["fits"]
    assert found["closed"]["wire"]["data"]["all-gather"] > 0
    assert "Fits" in capsys.readouterr().out


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

    with pytest.raises(TypeError, match=r"looks at a value.*\n.*test_plan.py:\d+ \(step\): return \(w if x.sum"):
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


@pytest.mark.slow
@pytest.mark.compile
def test_a_plan_counts_what_rests_off_the_device():
    train_step = jzero.make_train_step(lambda w, x: jnp.mean((x @ w["a"]) ** 2), optax.adamw(1e-3))
    state = jax.eval_shape(lambda: train_step.init({"a": jnp.zeros((512, 512))}))
    batch = jax.ShapeDtypeStruct((16, 512), jnp.float32)
    plain = jzero.shard(train_step, stage=3)
    step = jzero.shard(train_step, stage=3, offload=jzero.Offload(opt_state="host", activations="host"))
    found = {name: jzero.plan(one, state, batch, target="v5e:2x2") for name, one in (("plain", plain), ("offload", step))}
    moved = 8 * 512 * 512 // 4
    at_rest = {name: plan.compiled["at_rest"]["opt_state"] for name, plan in found.items()}
    assert at_rest["plain"] - at_rest["offload"] == moved == found["offload"].compiled["offload"]["moved_bytes"]
    assert any("524 kB rest in pinned_host" in line for line in found["offload"].compiled["findings"])


def test_tensor_splits_what_the_rules_split():
    whole, piece = (make("llama-8b", "h100:2x8", seq=2048, batch=16, mesh=mesh) for mesh in ({}, {"data": 2, "tensor": 8}))
    rest = [closed.memory(job).at_rest["params"] for job in (whole, piece)]
    assert rest[1] == pytest.approx(rest[0], rel=1e-3)  # split over 16 devices either way; norms over data alone
    activation = 2 * piece.micro_tokens * piece.config.dim
    sums = 5 * piece.config.num_layers + 2  # two forward, two backward, attention's again; embedding and head
    assert closed.wire(piece)["tensor"] == {"all-reduce": sums * activation * 2 * 7 // 8}
    assert closed.wire(piece)["data"]["all-gather"] < closed.wire(whole)["data"]["all-gather"] / 8


@pytest.mark.parametrize(("schedule", "live"), [("1f1b", 4), ("gpipe", 16)])
def test_a_pipeline_keeps_what_its_schedule_keeps(schedule, live):
    mesh = {"pipe": 4, "data": 4}
    job = make("llama-8b", "h100:2x8", stage=1, seq=2048, batch=64, accumulate=16, mesh=mesh, schedule=schedule)
    parts = closed.memory(job).parts
    assert parts["saved activations"] == live * 8 * 2 * job.micro_tokens * job.config.dim  # 8 layers a stage
    assert parts["params at rest"] == pytest.approx(4 * (closed.num_params(job.config) + 3 * num_outside(job)) / 16, rel=1e-3)
    assert times(job).mfu < times(job._replace(mesh={"data": 16}, accumulate=4, schedule=None)).mfu
    (line,) = [line for line in plan_job(job, compile_too=False).notes if line.startswith("pipeline")]
    assert "bubble 15.8%" in line  # 3 of 19


def num_outside(job):
    """Embedding and head rest on every pipe stage."""
    return sum(leaf.size for leaf in closed.leaves(job.config) if not leaf.is_layer)


def test_search_tries_every_axis():
    job = make("llama-8b", "h100:2x8", seq=2048, batch=64)
    tried = [one.mesh for one in search.candidates(job)]
    assert {axis for mesh in tried for axis in mesh} == {"replica", "data", "pipe", "tensor"}
    assert all(math.prod(mesh.values()) == 16 and mesh.get("tensor", 1) <= 8 for mesh in tried)
    assert all(one.accumulate >= 2 * one.pipe for one in search.candidates(job) if one.pipe > 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mesh": {"tensor": 16}}, "Legal sizes of axis 'tensor' are 2, 4, 8."),
        ({"mesh": {"pipe": 64}, "accumulate": 64}, "llama-8b has 32 layers"),
        ({"schedule": "1f1b"}, "a schedule needs a pipeline"),
        ({"mesh": {"pipe": 4}, "schedule": "1f2b"}, "unknown schedule"),
        ({"mesh": {"sequence": 4}}, "split over replica, data, pipe, tensor"),
    ],
)
def test_axes_that_do_not_fit(asked, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make("llama-8b", "h100:8x8", seq=2048, **asked)
