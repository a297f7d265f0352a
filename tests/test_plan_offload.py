"""Plans of what rests off the device: bytes, buckets, budgets and time."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from benchmarks import plans_compared
from jzero import models
from jzero.engine.bringing import Bringing
from jzero.engine.by_slices import SlicedProgram
from jzero.plan import closed, facts, hosts, names, offloads, room, search, worker
from jzero.plan.job import Job, make
from jzero.plan.main import main
from jzero.plan.pasted import python_of
from jzero.plan.planned import plan_job
from jzero.plan.times import times


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
    assert found["offload"].budgets["host"]["need"] == moved


def job_of(offload, model="llama-8b", target="h100:1x1", **asked):
    return make(model, target, **({"seq": 4096} | asked), offload=names.offload(offload) if offload else None)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("offload", ["opt_state=host", "opt_state=host,params=host", "opt_state=host,params=host,fraction=0.5"])
def test_the_device_lacks_exactly_what_the_host_has(offload, stage):
    plain, job = (job_of(one, model="llama-1b", target="h100:1x8", stage=stage) for one in (None, offload))
    rest = [sum(closed.memory(one).at_rest.values()) for one in (plain, job)]
    found = offloads.away(job)
    assert rest[0] - rest[1] == sum(found.gone.values()) == found.host_moved
    whole = (12 if "params" in offload else 8) * closed.num_params(job.config) / 8
    if "fraction" not in offload:
        assert found.host_moved == pytest.approx(whole, rel=1e-3)  # norms stay whole
    else:
        assert 0.5 * whole <= found.host_moved <= 0.8 * whole  # whole leaves, and three of an eighth of it each


def test_fraction_keeps_what_the_engine_keeps():
    """The very leaves: `jzero.shard`'s layout of the same state on eight devices, each role's bytes compared."""
    asked = jzero.Offload(opt_state="host", params="host", fraction=0.7)
    job = make("llama-tiny", "h100:1x8", seq=32, offload=asked)
    model = models.build(job.config)
    train_step = jzero.make_train_step(model.loss, optax.adamw(1e-3), precision="bf16")
    step = jzero.shard(train_step, stage=3, offload=asked)
    state = jax.eval_shape(lambda: train_step.init(model.init(jax.random.key(0))))
    leaves, places = jax.tree.leaves(state.params), jax.tree.leaves(step.shardings(state).params)
    gone = [place.memory_kind == "pinned_host" for place in places]
    sizes = [math.prod(place.shard_shape(leaf.shape)) * 4 for leaf, place in zip(leaves, places, strict=True)]
    assert offloads.away(job).gone["params"] == sum(size for size, is_gone in zip(sizes, gone, strict=True) if is_gone)
    assert 0 < sum(gone) < len(gone)


# What the compilers made of steps with offload (`benchmarks/plans_offload.py --compare`): measured, not copied by hand.
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COMPARED = json.loads(max(RESULTS.glob("*-plans-offload-axes.json")).read_text())["rows"]
OFFLOADED = {line: row for line, row in COMPARED.items() if "offload" in row}


@pytest.mark.parametrize("line", OFFLOADED)
def test_buckets_are_the_engines(line):
    job, row = plans_compared.job_of(line), OFFLOADED[line]
    found, measured = offloads.away(job), row["offload"]
    assert found.sent == measured["moved_bytes"]
    assert [trip.num for trip in found.trips] == [bucket["slices"] for bucket in measured["buckets"]]
    assert [trip.sent for trip in found.trips] == [bucket["moved_bytes"] for bucket in measured["buckets"]]
    assert found.grads == measured["grad_bytes"]
    uses = (found.uses.comes, found.uses.left, found.uses.grads)
    assert uses == tuple(measured.get(key, 0) for key in ("fetched_bytes", "left_bytes", "grads_in_host_bytes"))
    temps = [
        (trip.worked, bucket["temp_bytes"])
        for trip, bucket in zip(found.trips, measured["buckets"], strict=True)
        if trip.by_host or trip.load.grads_there
    ]
    assert all(worked == pytest.approx(temp, rel=0.015) for worked, temp in temps)
    for role in ("params", "opt_state"):
        assert closed.memory(job).at_rest[role] == pytest.approx(row["at_rest"][role], abs=64)  # and the optimizer's count
    assert closed.memory(job).peak_bytes == pytest.approx(row["peak_bytes"], rel=0.06)


def test_times_by_hand():
    """Llama 8B on one H100: 12 bytes a parameter in turns both ways, and parameters once more before the step."""
    job = job_of("opt_state=host,params=host")
    found, link = times(job), 63e9 * 0.8
    params = 4 * closed.num_params(job.config)
    assert found.transfer.fetch_s == pytest.approx(params / link)
    assert found.transfer.link_s == pytest.approx(2 * 3 * params / link, rel=1e-3)  # norms go whole, both ways at once
    assert found.step_s == pytest.approx(found.compute_s + found.update_s + found.transfer.waited_s)
    assert found.bound == "host link"
    assert times(job_of("opt_state=host,params=host", accumulate=64, batch=64)).bound == "compute"


def test_times_by_hand_where_the_host_updates():
    """Per parameter 4 bytes of gradient over the link and 28 of host memory; the device's own update is gone."""
    asked = "opt_state=host,params=host,update="
    job = job_of(f"{asked}host", model="llama-1b", target="v5e:2x2")
    found, sent = times(job), times(job).transfer
    params = 4 * closed.num_params(job.config) / 4
    assert sent.link_s == pytest.approx(params / (16e9 * 0.8), rel=1e-3)
    assert sent.host_s == pytest.approx(7 * params / (51.2e9 * 0.8), rel=1e-3)
    assert sent.waited_s == pytest.approx(sent.fetch_s + sent.link_s + sent.host_s)
    assert found.update_s == 0
    away = offloads.away(job)
    assert (away.sent, away.back) == (away.grads, 0)
    assert closed.memory(job).at_rest == closed.memory(job_of(f"{asked}device", model="llama-1b", target="v5e:2x2")).at_rest
    # A TPU's link is a quarter of its host's memory rate; eight GPUs share a host whose links are as fast as its memory.
    assert offloads.update_of(job_of(f"{asked}auto", model="llama-1b", target="v5e:2x2")) == "host"
    assert offloads.update_of(job_of(f"{asked}auto", model="llama-1b", target="h100:1x8")) == "device"
    plan = plan_job(job_of(f"{asked}auto", model="llama-1b", target="v5e:2x2"), compile_too=False)
    assert plan.job["offload"]["update"] == "host"
    assert any("on the host, by the figures" in note for note in plan.notes)
    assert any("host's memory_bandwidth: assumed" in note for note in plan.notes)


def test_a_drive_holds_two_generations_and_is_read_and_written_at_once():
    job = job_of("opt_state=nvme:/data,bucket_bytes=1GB", model="llama-1b", disk_bandwidth=3 * 10**9)
    found, sent = offloads.away(job), times(job).transfer
    payload = 8 * closed.num_params(job.config)
    assert (found.disk_moved, found.disk_bytes, found.host_moved) == (payload, 2 * payload, 0)
    assert found.pool == 4 * max(trip.disk // trip.num for trip in found.trips) <= 4.2e9
    assert sent.disk_s == pytest.approx(2 * payload / 3e9, rel=0.1)  # what fills the pool is read beside the gradient
    assert sent.disk_s < 2 * payload / 3e9
    assert times(job).bound == "disk"


@pytest.mark.parametrize(("precision", "again"), [("bf16", 4), ("fp32", 0)])
def test_parameters_in_files_come_first_and_masters_twice(precision, again):
    """Four bytes a parameter before the gradient; and, where they were cast, with their moments once more."""
    everything = "opt_state=nvme:/data,params=nvme:/data,bucket_bytes=1GB"
    job = job_of(everything, model="llama-1b", disk_bandwidth=3 * 10**9, precision=precision)
    found, sent, psi = offloads.away(job), times(job).transfer, closed.num_params(job.config)
    assert (found.disk_moved, found.disk_read, sum(found.brought)) == (12 * psi, (8 + again) * psi, 4 * psi)
    assert (found.disk_bytes, found.host_moved, found.still_here) == (24 * psi, 0, (4 - again) * psi)
    assert sent.read_s == pytest.approx(4 * psi / 3e9)
    assert sent.disk_s == pytest.approx((20 + again) * psi / 3e9, rel=0.1)  # what fills the pool is read beside the gradient
    assert times(job).bound == "disk"
    assert closed.memory(job).at_rest["params"] == 0
    assert found.pool <= 4e9
    mixed = job._replace(offload=jzero.Offload(opt_state="nvme:/data", bucket_bytes=10**9))
    spared = closed.memory(mixed).peak_bytes - closed.memory(job).peak_bytes
    assert spared >= (3.9 if again else 0) * psi  # masters, where the gradient is computed with a copy of them


@pytest.mark.parametrize(
    ("opt_state", "precision"),
    [
        ("nvme:/data", "bf16"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("nvme:/data", "bf16-pure"), ("host", "bf16"))),
    ],
)
def test_what_comes_first_and_the_buckets_are_the_engines(opt_state, precision):
    asked = jzero.Offload(opt_state=opt_state, params="nvme:/data", bucket_bytes=2 * 10**6)
    job = make("llama-tiny,num_layers=4,dim=512,ffn_dim=1024", "h100:1x1", seq=32, precision=precision, offload=asked)
    model = models.build(job.config)
    train_step = jzero.make_train_step(model.loss, optax.adamw(1e-3), precision=precision)
    step = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(devices=jax.devices()[:1]), offload=asked)
    plan = step._plan(step._layout(jax.eval_shape(lambda: train_step.init(model.init(jax.random.key(0))))))
    bringing = Bringing(plan.layout, step.options, plan.compute_dtype, plan.bucket_bytes)
    size = lambda index: plan.layout.avals[index].size * plan.layout.avals[index].dtype.itemsize
    groups = [sum(size(piece.index) // piece.num_parts for piece in group) for group in bringing.groups]
    found = offloads.away(job)
    assert list(found.brought) == groups
    assert any(piece.num_parts > 1 for group in bringing.groups for piece in group)
    assert [trip.host + trip.disk for trip in found.trips] == [bucket.moved_bytes for bucket in plan.buckets]
    rounds = [SlicedProgram(plan, bucket, step.options, keeps_params=True).num_rounds for bucket in plan.buckets]
    assert [trip.num for trip in found.trips] == rounds
    # beside moments in host memory they go whole, and so does what is rounded by noise that depends on an element's place
    assert (max(rounds) > 1) == (opt_state != "host" and precision == "bf16")
    assert found.still_here == sum(map(size, plan.held))
    assert (found.still_here > 0) == (precision == "bf16-pure")


AT_USE = "opt_state=host,params=host,fetch=use"


@pytest.mark.parametrize(
    ("model", "mesh", "asked"),
    [
        ("gpt2-tiny,num_layers=2", {"data": 4}, {"accumulate": 2}),
        ("llama-tiny,num_layers=2,dim=192", {"data": 1}, {"update": "host"}),
        pytest.param(
            "llama-tiny,num_layers=6,dim=192,tied=1",
            {"data": 4},
            {"precision": "fp32", "fraction": 0.9},
            marks=pytest.mark.slow,
        ),
        pytest.param("mixtral-tiny,num_layers=2", {"data": 2, "expert": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_what_comes_at_its_use_is_the_engines(model, mesh, asked):
    """Of a compiled step: which leaves come, how often, what leaves, and what of the update goes over the link."""
    rest = {name: value for name, value in asked.items() if name not in ("precision", "accumulate")}
    offload = jzero.Offload(opt_state="host", params="host", fetch="use", bucket_bytes=1_000_000, **rest)
    rest = {name: value for name, value in asked.items() if name in ("precision", "accumulate")}
    job = make(model, f"h100:1x{math.prod(mesh.values())}", seq=16, mesh=mesh, offload=offload, **rest)
    made = models.build(job.config)
    train_step = jzero.make_train_step(made.loss, optax.adamw(1e-3), precision=job.precision, accumulate=job.accumulate)
    devices = jax.devices()[: job.num_devices]
    step = jzero.shard(
        train_step,
        stage=3,
        mesh=jzero.make_mesh(**mesh, devices=devices),
        remat="full",
        rules=worker.rules_of(job),
        offload=offload,
    )
    state = jax.eval_shape(lambda: train_step.init(made.init(jax.random.key(0))))
    measured = step.report(state, jax.ShapeDtypeStruct((job.batch, job.seq + 1), jnp.int32)).offload
    found = offloads.away(job)
    keys = ("fetched_bytes", "left_bytes", "grads_in_host_bytes", "grad_bytes", "moved_bytes", "back_bytes")
    planned = (found.uses.comes, found.uses.left, found.uses.grads, found.grads, found.sent, found.back)
    assert dict(zip(keys, planned, strict=True)) == {key: measured[key] for key in keys}
    assert found.host_moved == measured["at_rest"]["pinned_host"]
    assert [trip.sent for trip in found.trips] == [bucket["moved_bytes"] for bucket in measured["buckets"]]
    assert [trip.num for trip in found.trips] == [bucket["slices"] for bucket in measured["buckets"]]
    assert found.uses.grads > 0


@pytest.mark.parametrize(("accumulate", "copies"), [(1, 1), (2, 2), (8, 2)])
def test_gradients_in_host_memory_by_hand(accumulate, copies):
    """Llama 8B on one H100: 12 bytes a parameter rest there, and 4 of gradients, twice while sums are made; norms apart."""
    asked = {"accumulate": accumulate, "batch": accumulate}
    plain, job = (job_of(one, **asked) for one in ("opt_state=host,params=host", AT_USE))
    before, found, psi = offloads.away(plain), offloads.away(job), closed.num_params(job.config)
    near = lambda number: pytest.approx(number, rel=1e-3)
    assert found.gone == before.gone
    assert closed.memory(job).at_rest == closed.memory(plain).at_rest
    assert found.host_bytes - before.host_bytes == near(copies * 4 * psi)
    assert before.grads - found.grads == found.uses.grads == near(4 * psi)
    tables = 2 * 4 * job.config.vocab_size * job.config.dim
    sums = 4 * psi if accumulate > 1 else 0
    assert found.uses.comes == near(
        accumulate * (8 * psi - tables + sums)
    )  # the head comes once, and so does what is looked up
    assert found.uses.left == near(accumulate * 4 * psi)
    assert found.fetched == 4 * psi - found.uses.grads  # the norms
    assert (found.sent, found.back) == (near(16 * psi), near(12 * psi))
    by_host = offloads.away(job_of(f"{AT_USE},update=host", **asked))
    assert by_host.sent == by_host.grads == found.grads  # the norms' gradients
    peaks = [closed.memory(one, fused_attention=True).peak_bytes for one in (plain, job)]
    of_layers = psi - 2 * job.config.vocab_size * job.config.dim
    assert peaks[0] - peaks[1] > 0.95 * (6 if accumulate == 1 else 8) * of_layers  # working copy, gradients, sums
    assert closed.wire(job) == closed.wire(plain)


def test_what_comes_at_its_use_passes_beside_the_layers():
    """As long as the gradient takes longer than the longer way over the link: 12 bytes a parameter and microbatch."""
    link = 63e9 * 0.8
    for micro, is_hidden in ((1, False), (32, True)):
        job = job_of(AT_USE, accumulate=4, batch=4 * micro, seq=2048)
        found, away = times(job), offloads.away(job)
        sent = found.transfer
        assert sent.uses_s == pytest.approx(away.uses.comes / link)
        assert (sent.uses_s < found.compute_s) == is_hidden
        shown = max(0.0, sent.uses_s - found.compute_s)
        assert sent.waited_s == pytest.approx(sent.fetch_s + sent.link_s + shown)
        assert found.step_s == pytest.approx(found.compute_s + found.update_s + sent.waited_s)
        assert sent.link_s == pytest.approx((16 + 12) * closed.num_params(job.config) / link, rel=1e-3)


def test_activations_pass_beside_the_layers():
    job = job_of("activations=host", model="llama-1b", target="v5e:4x4", seq=2048)
    assert job.remat == "dots"
    plain, parts = (closed.memory(one).parts for one in (job._replace(offload=None), job))
    found = offloads.away(job)
    layers = job.config.num_layers
    assert plain["saved activations"] - parts["saved activations"] == found.activations * (layers - 2) // layers
    assert times(job).transfer.hidden == 1.0 or times(job).transfer.waited_s > 0


def test_activations_in_host_memory_leave_the_device_as_compiled():
    """The v5e program keeps one and a half layers' of them on the device, the plan two."""
    plain, away = (
        COMPARED[f"llama-1b,num_layers=4 v5e:2x2 seq=2048 {word}"] for word in ("remat=dots", "offload=activations=host")
    )
    job = plans_compared.job_of("llama-1b,num_layers=4 v5e:2x2 seq=2048 offload=activations=host")
    fall, found = plain["peak_bytes"] - away["peak_bytes"], offloads.away(job)
    assert found.activations - found.kept_activations <= fall <= found.activations


@pytest.mark.parametrize(
    ("asked", "short"),
    [
        ({"offload": "opt_state=host"}, ["device"]),
        ({"offload": "opt_state=host,params=host", "host_memory": 64 * 10**9}, ["host"]),
        ({"offload": "opt_state=nvme:/data", "model": "llama-1b", "disk": 10**10}, ["disk"]),
        ({"offload": "opt_state=host,params=host", "model": "llama-70b"}, ["device", "host"]),
    ],
)
def test_what_is_short_is_named(asked, short):
    plan = plan_job(job_of(**asked), compile_too=False)
    assert list(plan.short) == short
    assert not plan.fits
    assert all(f"of {name}" in str(plan) for name in ("device memory",) * ("device" in short))
    assert all(room.fits(Job.of(change["job"]), plan.usable_bytes) for change in plan.changes)
    json.dumps(plan.to_dict())


def test_offload_is_a_change_that_is_tried():
    plan = plan_job(make("llama-8b", "h100:1x1", seq=4096), compile_too=False)
    assert "--offload opt_state=host,params=host" in [change["flags"] for change in plan.changes]
    short = plan_job(job_of("opt_state=host,params=host", model="llama-1b", host_memory=12 * 10**9), compile_too=False)
    assert any("fraction" in change["flags"] for change in short.changes)


def test_what_a_gpu_compiler_cannot_show_is_not_compiled():
    asked = [None, "opt_state=host,params=host", AT_USE, "activations=host", "opt_state=host,update=host"]
    for target, blind in (("h100:1x8", [False, False, True, True, True]), ("v5e:2x2", [False] * 5)):
        jobs = [job_of(one, model="llama-1b", target=target) for one in asked]
        assert [offloads.is_blind(job) for job in jobs] == blind
    short = plan_job(job_of(AT_USE, model="llama-405b", target="h100:1x1"))  # takes minutes where it is compiled
    assert short.compiled is None
    assert any("knows no host memory" in note for note in short.notes)


def test_a_host_has_sources():
    for target, host in hosts.HOSTS.items():
        assert set(host.source) == {"devices", "memory", "link", "disk", "disk_bandwidth", "memory_bandwidth"}, target
        assert host.memory > 0 < host.link
        assert 20e9 < host.memory_bandwidth < 1e12, "of one device's share"
    assert set(hosts.HOSTS) == set(facts.FACTS)


def test_the_search_tries_offload_and_it_can_be_pasted():
    job = make("llama-8b", "h100:1x1", seq=2048, batch=4)
    found = search.search(job, compile_best=0)
    assert found["num_candidates"] > len(list(search.candidates(job)))
    assert found["winner"]["job"]["offload"] == {"opt_state": "host", "params": "host"}  # nothing else fits one of them
    assert "offload=jzero.Offload(opt_state='host', params='host')" in python_of(found["winner"]["job"])
    larger = search.search(make("llama-8b,num_layers=64", "h100:1x1", seq=2048, batch=4, host_memory=10**12), compile_best=0)
    asked = "offload=jzero.Offload(opt_state='host', params='host', fetch='use')"
    assert asked in python_of(larger["winner"]["job"])  # gradients do not fit, either
    assert larger["winner"]["job"]["stage"] == 3


@pytest.mark.slow
def test_pasted_offload_trains():
    small = make("gpt2-tiny,num_layers=2", "h100:1x8", seq=32, offload=jzero.Offload(opt_state="host"))
    pasted: dict = {}
    exec(python_of(small.to_dict()), pasted)  # on the eight simulated devices of the tests
    tokens = jnp.zeros((small.batch, small.seq + 1), jnp.int32)
    _, metrics = pasted["step"](pasted["state"], tokens)
    assert jnp.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--offload", "opt_stat=host"], "Did you mean 'opt_state'"),
        (["--offload", "opt_state=disk"], "names no place"),
        (["--offload", "params=nvme:"], "names no folder"),
        (["--offload", "activations=host", "--remat", "full"], "the host holds what dots saves"),
        (["--disk-bandwidth", "3GB"], "would have no effect"),
        (["--offload", "opt_state=host", "--host-memory", "many"], "not a number of bytes"),
        (["--offload", "activations=host", "--mesh", "pipe=2", "--accumulate", "4"], "a pipeline saves no activations"),
        (["--offload", AT_USE, "--stage", "2"], "only stage 3"),
        (["--offload", AT_USE, "--mesh", "pipe=2", "--accumulate", "4"], "a pipeline fetches its parameters once a step"),
        (["--offload", AT_USE, "--precision", "bf16-pure"], "gradients have the dtype of the parameters"),
        (["--offload", AT_USE, "--mesh", "replica=2"], "no effect"),
        (["--offload", "opt_state=host,fetch=use"], "about parameters in host memory"),
    ],
)
def test_bad_input_is_explained(words, said, capsys):
    assert main(["--model", "llama-8b", "--target", "h100:1x8", "--closed-form-only", *words]) == 2
    assert said in capsys.readouterr().err
