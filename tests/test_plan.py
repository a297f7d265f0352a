"""Plans: the closed form against real parameters and against figures that the compilers gave, and ways to ask for one."""

import json
import time
from pathlib import Path

import pytest
from fixtures.compilers import compilers as compilers

from benchmarks import plan_grid
from jzero import models
from jzero.plan import closed, facts, fit
from jzero.plan.job import count, make
from jzero.plan.main import main
from jzero.plan.planned import plan_job
from jzero.plan.times import times
from jzero.topology import parse
from jzero.topology_specs import GPUS, TPUS

# What the compilers made of sixty configurations, as benchmarks/plan_grid.py stored it: measured, not copied by hand.
GRID = json.loads(max((Path(__file__).parent.parent / "benchmarks" / "results").glob("*-plan-grid.json")).read_text())["rows"]


COMPILED = {line: row for line, row in GRID.items() if "error" not in row}


@pytest.mark.parametrize("name", models.PRESETS)
def test_shapes_are_those_of_the_model(name):
    model = models.build(name)
    assert closed.num_params(model.config) == model.num_params
    assert closed.flops_per_token(model.config, 512) == pytest.approx(model.flops_per_token(512), rel=1e-12)


def test_a_preset_may_be_changed():
    assert make("llama-8b,num_layers=2", "h100:1x8").config.num_layers == 2
    with pytest.raises(ValueError, match="num_leyers"):
        make("llama-8b,num_leyers=2", "h100:1x8")
    with pytest.raises(ValueError, match="name=number"):
        make("llama-8b,tied=yes", "h100:1x8")


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


def test_the_command_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["--model", "gpt2-tiny", "--target", "h100:1x2", "--closed-form-only", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["fits"]
    assert found["closed"]["wire"]["data"]["all-gather"] > 0
    assert "Fits" in capsys.readouterr().out
