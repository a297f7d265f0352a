"""Plans with the axes tensor, sequence, expert and pipe."""

import json
from pathlib import Path

import pytest
from fixtures.compilers import compilers as compilers

from benchmarks import plans_compared
from jzero.plan import closed, exchanges, moments, search
from jzero.plan.job import make
from jzero.plan.pasted import python_of
from jzero.plan.planned import plan_job
from jzero.plan.times import times


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


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mesh": {"tensor": 16}}, "Legal sizes of axis 'tensor' are 2, 4, 8."),
        ({"mesh": {"pipe": 64}, "accumulate": 64}, "llama-8b has 32 layers"),
        ({"schedule": "1f1b"}, "a schedule needs a pipeline"),
        ({"mesh": {"pipe": 4}, "schedule": "1f2b"}, "unknown schedule"),
        ({"mesh": {"sequence": 64}, "seq": 2000}, "Legal sizes of axis 'sequence' are 2, 4, 5, 8"),
        ({"mesh": {"expert": 2}}, "Legal sizes of axis 'expert' are none."),
        ({"mesh": {"sequences": 2}}, "Did you mean 'sequence'"),
    ],
)
def test_axes_that_do_not_fit(asked, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make("llama-8b", "h100:8x8", **({"seq": 2048} | asked))


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COMPARED = json.loads(max(RESULTS.glob("*-plans-offload-axes.json")).read_text())["rows"]
SPLIT = {line: row for line, row in COMPARED.items() if "sequence" in line or "expert" in line}


@pytest.mark.parametrize("line", SPLIT)
def test_new_axes_meet_the_compilers(line):
    job, row = plans_compared.job_of(line), SPLIT[line]
    need, found = closed.memory(job), closed.wire(job)
    for role in ("params", "opt_state", "batch"):
        wanted = row["at_rest"][role]
        # Tokens are split over `sequence` too where it divides them, which seq + 1 it does not.
        assert need.at_rest[role] == pytest.approx(wanted, abs=64), role
    assert need.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.10)
    for axis, kinds in row["wire"].items():
        assert sum(found.get(axis, {}).values()) == pytest.approx(sum(kinds.values()), rel=0.02, abs=1e6), axis


def test_a_ring_where_heads_do_not_divide():
    model = "llama-8b,num_heads=20,num_kv_heads=4,dim=2560,ffn_dim=7168"
    job = make(model, "h100:1x8", seq=4096, mesh={"data": 1, "sequence": 8})
    assert job.attention_kind == "ring"
    assert "collective-permute" in closed.wire(job)["sequence"]
    assert 'attention_kind="ring"' in python_of(job.to_dict())
    assert make("llama-8b", "h100:1x8", mesh={"sequence": 8}).attention_kind == "ulysses"


def test_sequence_divides_activations_and_work():
    whole, split = (make("llama-8b", "h100:1x8", seq=4096, batch=8, mesh=mesh) for mesh in ({}, {"data": 2, "sequence": 4}))
    split = split._replace(batch=2)
    assert split.micro_tokens * 4 == whole.micro_tokens
    parts = [moments.moments(job)["backward"] for job in (whole, split)]
    for name in ("saved activations", "attention scores", "one layer's activations"):
        assert parts[0][name] == 4 * parts[1][name] > 0, name
    at_rest = [closed.memory(job).at_rest["params"] for job in (whole, split)]
    assert at_rest[0] == at_rest[1]  # over data x sequence
    assert times(split).compute_s == pytest.approx(times(whole).compute_s / 4)


def test_experts_have_room_for_all():
    job = make("mixtral-8x7b", "h100:1x8", seq=2048, mesh={"data": 2, "expert": 4})
    rows = exchanges.num_rows(job)
    assert rows == 4 * job.micro_tokens * 2  # n times B T min(K, E / n)
    sent = 2 * 3 * rows * job.config.dim * 2 + 2 * 4 * 8  # there and back, thrice under remat, and the counts
    assert closed.wire(job)["expert"]["all-to-all"] == sent * 3 // 4 * job.config.num_layers
    held = closed.memory(job).at_rest["params"]
    assert held == pytest.approx(4 * closed.num_params(job.config) / 8, rel=1e-3)  # experts over both, dense leaves too
    assert any("4 times the rows" in line for line in plan_job(job, compile_too=False).notes)
    some = job._replace(model="mixtral-8x7b,capacity_factor=1.25")
    assert exchanges.num_rows(some) == 8 * some.micro_sequences * 640  # E experts, each 1.25 T K / E of a sequence's tokens
    assert times(some).compute_s < times(job).compute_s  # no masked products, fewer empty rows
    assert {"expert"} <= {axis for mesh in search.meshes(job) for axis in mesh}
    assert "rules=models.mixtral.expert_rules" in python_of(job.to_dict())


def test_axes_that_do_not_stand_together():
    for mesh in ({"pipe": 2, "sequence": 2}, {"pipe": 2}):
        with pytest.raises(NotImplementedError, match="a pipeline has neither"):
            make("mixtral-8x7b" if len(mesh) == 1 else "llama-8b", "h100:1x8", seq=2048, mesh=mesh, accumulate=4)
