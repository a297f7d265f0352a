"""The search: what it tries, keeps and pastes."""

import math
import os

import jax.numpy as jnp
import pytest
from fixtures.compilers import compilers as compilers

from jzero.plan import compiled, machine, search
from jzero.plan.job import make
from jzero.plan.main import main
from jzero.plan.pasted import python_of
from jzero.plan.planned import plan_job


def test_search_keeps_the_front_and_writes_python():
    job = make("llama-8b", "h100:1x8", seq=4096, batch=32)
    found = search.search(job, compile_best=0)
    steps, peaks = ([row[key] for row in found["rows"]] for key in ("step_s", "peak_bytes"))
    assert steps == sorted(steps)
    assert peaks == sorted(peaks, reverse=True)
    every = [search.row_of(one, found_limit(job)) for one in search.candidates(job)]
    fitting = [row for row in every if row["fits"]]
    assert found["winner"]["step_s"] == min(row["step_s"] for row in fitting)


def found_limit(job):
    return plan_job(job, compile_too=False).usable_bytes


def test_the_winner_can_be_pasted(capsys):
    job = make("gpt2-tiny,num_layers=1", "h100:1x8", seq=32)
    found = search.search(job, compile_best=0)["winner"]["job"]
    pasted: dict = {}
    exec(python_of(found), pasted)  # on the eight simulated devices of the tests
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
        main(["--model", "llama-1b", "--target", "h100:1x2", "--seq", "2048", "--search", "--closed-form-only", "--price", "2"])
        == 0
    )


def test_the_table_shows_offload_where_there_is_some(capsys):
    words = ["--target", "h100:1x1", "--seq", "2048", "--batch", "2", "--search", "--closed-form-only"]
    heads = []
    for model in ("llama-1b", "llama-8b"):
        assert main(["--model", model, *words]) == 0
        heads.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")))
    assert "offload" in heads[1]
    assert all("compiled" in head for head in heads)


def test_compilers_side_by_side_fit_the_memory():
    assert machine.num_compilers(1) == 1
    assert machine.num_compilers(machine.COMPILER_BYTES * 1000) == os.cpu_count()
    assert machine.free_bytes() > 2**20


def test_search_replaces_a_winner_that_the_compiler_refutes(monkeypatch):
    job = make("llama-8b", "h100:1x8", seq=4096, batch=8)
    fastest = search.search(job, compile_best=0)["winner"]["job"]

    def too_large_first(one):
        return {"peak_bytes": 10**12 if one.to_dict() == fastest else 10**9}

    monkeypatch.setattr(compiled, "compile_job", too_large_first)
    found = search.search(job, compile_best=1)
    assert found["rows"][0]["compiled_peak_bytes"] == 10**12
    assert found["winner"]["job"] != fastest


def test_search_tries_every_axis():
    job = make("llama-8b", "h100:2x8", seq=2048, batch=64)
    tried = [one.mesh for one in search.candidates(job)]
    assert {axis for mesh in tried for axis in mesh} == {"replica", "data", "pipe", "sequence", "tensor"}
    assert all(math.prod(mesh.values()) == 16 and mesh.get("tensor", 1) <= 8 for mesh in tried)
    assert all(one.accumulate >= 2 * one.pipe for one in search.candidates(job) if one.pipe > 1)
