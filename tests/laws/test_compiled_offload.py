"""What offload takes off a device, on the real TPU compiler, which counts memories apart.

Bytes at rest on the device fall by exactly what moves, and host memory holds exactly that; temporaries grow by two buckets at
most; activations have their copies in host memory. (The GPU compiler without a device drops memory kinds.)
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from jzero import remat

pytestmark = pytest.mark.compile
BUCKET_BYTES = 16 * 2**20


@functools.cache
def mesh():
    return jzero.make_mesh(data=16, devices=jzero.topology("v5e:4x4"))


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def loss_fn(params, x):
    x, _ = jax.lax.scan(remat.wrap_layer(layer), x, params["layers"])
    return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)


def measured(**asked):
    """A stage 3 step's report and its gradient program's memory, for 16 chips."""
    return compiled(**asked)[1:]


def compiled(*, layers, width, rows, precision="bf16", policy=None, **asked):
    """The step too."""
    make = lambda: {
        "layers": {"up": jnp.zeros((layers, width, 4 * width)), "down": jnp.zeros((layers, 4 * width, width))},
        "head": jnp.zeros((width, 8 * width)),
    }
    train_step = jzero.make_train_step(loss_fn, optax.adamw(1e-3), precision=precision, accumulate=2, clip_norm=1.0)
    offload = jzero.Offload(**asked) if asked else None
    step = jzero.shard(train_step, stage=3, mesh=mesh(), remat=policy, offload=offload)
    state = jax.eval_shape(lambda: train_step.init(make()))
    batch = jax.ShapeDtypeStruct((16 * 2 * rows, width), jnp.bfloat16)
    report = step.report(state, batch)
    (program,) = step._programs.values()
    return step, report, program.compiled.memory_analysis(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def at_rest(report):
    return sum(report.bytes_at_rest[role]["measured"] for role in ("params", "opt_state"))


def check_at_rest(report, memory, num_params, *, elements, on_host):
    """`elements`: float32 numbers per parameter that move; `on_host`: those that the gradient program takes from the host."""
    moved = elements * 4 * num_params // 16
    assert at_rest(report) == 12 * num_params // 16 + 4 - moved  # 4: adam's count
    assert report.offload["at_rest"]["pinned_host"] == moved
    if report.offload["update"]["asked"] == "device":
        assert report.offload["moved_bytes"] == moved
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == on_host * 4 * num_params // 16
    assert memory.host_temp_size_in_bytes == 0


def test_what_moves_is_gone_from_the_device():
    report, memory, num_params = measured(layers=2, width=256, rows=8, opt_state="host", params="host")
    check_at_rest(report, memory, num_params, elements=3, on_host=1)


def test_parameters_in_files_are_on_the_device_as_the_working_copy_alone():
    """No byte of the state rests on the device; the gradient program takes bfloat16."""
    files = "nvme:/data/swap"
    report, memory, num_params = measured(layers=2, width=256, rows=8, opt_state=files, params=files)
    assert at_rest(report) == 4  # adam's count
    assert report.offload["at_rest"][files] == report.offload["moved_bytes"] == 12 * num_params // 16
    assert report.offload["brought_bytes"] == 4 * num_params // 16
    rows = 2 * 8 * 256 * 2  # of a device's batch
    assert 0 <= memory.argument_size_in_bytes - 2 * num_params // 16 - rows <= 1024 * 16  # beside them scalars and keys


@pytest.mark.slow
def test_with_all_state_in_files_the_peak_falls_by_all_of_it_but_two_buckets():
    size, files = {"layers": 16, "width": 2048, "rows": 128, "policy": "full"}, "nvme:/data/swap"
    plain, _, num_params = measured(**size)
    report, _, _ = measured(**size, opt_state=files, params=files, bucket_bytes=BUCKET_BYTES)
    assert report.peak_bytes <= plain.peak_bytes - 12 * num_params // 16 + 2 * BUCKET_BYTES
    assert any(row["slices"] > 1 for row in report.offload["buckets"])
    for row in report.offload["buckets"]:
        assert row["held_bytes"] + row["temp_bytes"] <= 1.02 * 2 * BUCKET_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("params", [None, "host"])
def test_temporaries_grow_by_two_buckets_at_most(params):
    size = {"layers": 16, "width": 2048, "rows": 128, "policy": "full"}
    plain, _, _ = measured(**size)
    report, memory, num_params = measured(**size, opt_state="host", params=params, bucket_bytes=BUCKET_BYTES)
    check_at_rest(report, memory, num_params, elements=3 if params else 2, on_host=1 if params else 0)
    assert report.temp_bytes <= plain.temp_bytes + 2 * BUCKET_BYTES
    assert any(row["slices"] > 1 for row in report.offload["buckets"])
    for row in report.offload["buckets"]:
        assert row["temp_bytes"] <= 1.02 * 2 * BUCKET_BYTES  # a slice arrives while another leaves; 1.02: scalars and tiles


def check_on_host(step, report, num_params, *, elements):
    """Update programs whose moments stay in host memory, updated in place: gradients leave, and what rests on the device."""
    travels = 4 * num_params // 16
    beside = travels * (3 - elements)
    assert (report.offload["moved_bytes"], report.offload["back_bytes"]) == (travels + beside, beside)
    (program,) = step._programs.values()
    memories = [one.compiled.memory_analysis() for one in program.buckets]
    assert sum(memory.host_argument_size_in_bytes for memory in memories) == elements * travels
    assert sum(memory.host_alias_size_in_bytes for memory in memories) == elements * travels
    for one, memory in zip(program.buckets, memories, strict=True):
        calls = [line for line in one.compiled.as_text().splitlines() if 'custom_call_target="HostExecute"' in line]
        assert len(calls) == 1
        assert calls[0].count("S(5)") >= 2 * elements, "moments travel"
        assert "output_to_operand_aliasing" in calls[0]
        assert memory.host_temp_size_in_bytes <= 1024, "host memory is copied"


def test_moments_stay_where_the_host_updates():
    step, report, memory, num_params = compiled(layers=2, width=256, rows=8, opt_state="host", update="host")
    check_at_rest(report, memory, num_params, elements=2, on_host=0)
    check_on_host(step, report, num_params, elements=2)


@pytest.mark.slow
@pytest.mark.parametrize("params", [None, "host"])
def test_temporaries_grow_by_two_buckets_at_most_where_the_host_updates(params):
    size = {"layers": 16, "width": 2048, "rows": 128, "policy": "full"}
    plain, _, _ = measured(**size)
    asked = {"opt_state": "host", "params": params, "bucket_bytes": BUCKET_BYTES, "update": "host"}
    step, report, memory, num_params = compiled(**size, **asked)
    check_at_rest(report, memory, num_params, elements=3 if params else 2, on_host=1 if params else 0)
    check_on_host(step, report, num_params, elements=3 if params else 2)
    assert report.temp_bytes <= plain.temp_bytes + 2 * BUCKET_BYTES
    assert any(row["slices"] > 1 for row in report.offload["buckets"])
    for row in report.offload["buckets"]:
        assert row["temp_bytes"] <= 1.02 * BUCKET_BYTES  # gradients, parameters, and those as they come back


def check_at_use(report, memory, num_params, num_stacked):
    """Parameters come from host memory and gradients go there; of several microbatches the sum is made beside the last one."""
    shard = 4 * num_params // 16
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == shard
    assert memory.host_output_size_in_bytes == 2 * shard
    assert memory.host_temp_size_in_bytes <= shard
    assert memory.output_size_in_bytes <= 64 * 1024, "gradients are given out on the device"
    head = shard - 4 * num_stacked // 16
    assert report.offload["fetched_bytes"] == 2 * (2 * shard - head + shard)  # two microbatches; the head once; sums
    assert report.offload["left_bytes"] == 2 * shard
    assert (report.offload["grad_bytes"], report.offload["grads_in_host_bytes"]) == (0, shard)
    assert any("come from host memory at each use" in line for line in report.findings)


@pytest.mark.parametrize("update", [pytest.param("device", marks=pytest.mark.slow), "host"])
def test_parameters_come_at_their_uses_and_gradients_leave(update):
    both = {"opt_state": "host", "params": "host", "update": update}
    report, memory, num_params = measured(layers=2, width=256, rows=8, **both, fetch="use")
    check_at_use(report, memory, num_params, num_params - 8 * 256 * 256)
    assert at_rest(report) == 4  # adam's count
    assert report.offload["moved_bytes"] == (0 if update == "host" else 16 * num_params // 16)


@pytest.mark.slow
def test_the_device_holds_no_more_of_sixteen_layers_than_of_four():
    """Neither parameters nor gradients: what each further layer takes is its saved input."""
    size = {"width": 1024, "rows": 32, "policy": "full", "opt_state": "host", "params": "host", "bucket_bytes": 2**20}
    few, many, whole = (
        measured(layers=layers, **size, fetch=fetch) for layers, fetch in ((4, "use"), (16, "use"), (16, "step"))
    )
    report, memory, num_params = many
    check_at_use(report, memory, num_params, num_params - 8 * 1024 * 1024)
    saved = 12 * 32 * 1024 * 2
    assert memory.temp_size_in_bytes <= few[1].temp_size_in_bytes + saved
    state = (2 + 4) * num_params // 16  # the working copy and the sum of gradients
    assert (
        report.offload["gradient_temp_bytes"]
        <= whole[0].offload["gradient_temp_bytes"] + whole[0].offload["grad_bytes"] - state
    )


@pytest.mark.slow
def test_activations_are_in_host_memory():
    size = {"layers": 8, "width": 1024, "rows": 4096}
    plain, _, _ = measured(**size, policy="dots")
    report, memory, _ = measured(**size, activations="host")
    wide, narrow = (8 * 4096 * width * 2 for width in (4096, 1024))  # layers x rows, bf16: what "up" and "down" give
    # The wide product at least; the narrow one, and the layer's input beside it, as the compiler likes.
    assert wide <= memory.host_temp_size_in_bytes <= 1.01 * (wide + 2 * narrow)
    assert report.temp_bytes <= plain.temp_bytes - wide / 2


@pytest.mark.slow
def test_activations_that_are_not_there_are_an_error():
    with pytest.raises(jzero.StageNotAchieved, match="nothing is saved in host memory"):
        measured(layers=2, width=256, rows=8, policy="offload:nothing")
