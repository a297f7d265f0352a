"""What the H100 and TPU compilers make of pipelines: temporaries follow the schedule, and only what is asked for is sent."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero

pytestmark = pytest.mark.compile

NUM_LAYERS, VOCAB = 8, 2048
ROWS = 2  # per microbatch and shard
SIZES = {"h100:1x8": (512, 256), "v5e:2x4": (2048, 1024)}  # width, length: on a TPU too much for vector memory
PIPE, DATA = 4, 2


def make_params(width):
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    layers = {"up": zeros(NUM_LAYERS, width, 4 * width), "down": zeros(NUM_LAYERS, 4 * width, width)}
    return {"embed": {"table": zeros(VOCAB, width)}, "layers": layers, "head": {"out": zeros(width, VOCAB)}}


def activation_bytes(target):
    width, length = SIZES[target]
    return ROWS * length * width * 2


def head(params, x, tokens):
    logits = (x @ params["out"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


MODEL = jzero.Pipeline(
    embed=lambda params, tokens: params["table"][tokens[:, :-1]],
    layers=lambda params, x: x + jax.nn.gelu(x @ params["up"]) @ params["down"],
    head=head,
)


@functools.cache
def report(target, schedule, num_micro, stage, remat="full"):
    train_step = jzero.make_train_step(MODEL, optax.adamw(1e-3), precision="bf16", accumulate=num_micro)
    mesh = jzero.make_mesh(pipe=PIPE, data=DATA, devices=jzero.topology(target)[: PIPE * DATA])
    step = jzero.shard(train_step, stage=stage, mesh=mesh, schedule=schedule, remat=remat)
    state = jax.eval_shape(lambda: train_step.init(make_params(SIZES[target][0])))
    return step.report(state, jax.ShapeDtypeStruct((num_micro * DATA * ROWS, SIZES[target][1] + 1), jnp.int32))


def growth(target, schedule, fewest, most):
    """Bytes of temporaries per microbatch, and what of them the schedule's buffers account for."""
    small, large = (report(target, schedule, num, 1) for num in (fewest, most))
    buffers = lambda one: sum(one.programs["pipeline"][name] for name in ("stash_bytes", "exchange_bytes"))
    added = buffers(large) - buffers(small)
    return (large.temp_bytes - small.temp_bytes) / (most - fewest), added / (most - fewest)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1x8", "v5e:2x4"])
def test_1f1b_does_not_grow_with_microbatches(target):
    per_micro, buffers = growth(target, "1f1b", 4, 32)
    assert buffers == 0
    assert per_micro <= 0.01 * activation_bytes(target), "a hundredth of one activation"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1x8", "v5e:2x4"])
def test_gpipe_grows_with_microbatches(target):
    per_micro, buffers = growth(target, "gpipe", 4, 32)
    assert buffers == (NUM_LAYERS // PIPE + 1) * activation_bytes(target)  # each layer's input, and the head's gradient
    assert per_micro == pytest.approx(buffers, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_traffic(stage):
    """What is sent is what the formula says; reductions inside the table are measured in every tick, and it knows in which."""
    found = report("h100:1x8", "1f1b", 8, stage)
    wire = {axis: {kind: dict(row) for kind, row in kinds.items()} for axis, kinds in found.wire_bytes.items()}
    if stage == 0:  # the compiler joins the sums of what lies outside the layers, over `pipe` and over `data`: a third less
        outside = 2 * VOCAB * SIZES["h100:1x8"][0] * 4  # bytes of float32
        for axis, size, sign in (("data", DATA, -1), ("pipe", PIPE, -1), ("data+pipe", DATA * PIPE, 1)):
            wire[axis]["all-reduce"]["formula"] += sign * 2 * (size - 1) * outside // size
    for axis, kinds in wire.items():
        for kind, row in kinds.items():
            assert row["measured"] >= 0.99 * row["formula"], (axis, kind, row)
            if stage < 2 or axis != "data":
                assert row["measured"] <= 1.01 * row["formula"], (axis, kind, row)
    assert not [line for line in found.findings if "nobody asked for" in line]
