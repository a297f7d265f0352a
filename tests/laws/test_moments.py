"""Moments in 8 bits and in bfloat16: what the numbers can say, that blocks follow the stages, and how well they train."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

import jzero
from jzero.optim import blocks
from pallas_kernels.quantize import dynamic_map

BYTES = jnp.arange(256, dtype=jnp.uint8)


def table(signed):
    return np.asarray(dynamic_map.decode(BYTES, signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_papers(signed):
    """As bitsandbytes' create_dynamic_map(signed, 7, 8) makes it: bin means of each decade, then 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *(-means if signed else ())]
    np.testing.assert_allclose(table(signed), np.sort(values), rtol=1e-6)
    np.testing.assert_array_equal(dynamic_map.encode(table(signed), signed=signed), BYTES)


@pytest.mark.parametrize("signed", [True, False])
def test_values_go_to_their_nearest_neighbour(signed):
    random = np.random.default_rng(0)
    values = (random.uniform(-1 if signed else 0, 1, 20_000) * 10 ** random.uniform(-6, 0, 20_000)).astype(np.float32)
    found = np.abs(table(signed)[np.asarray(dynamic_map.encode(values, signed=signed))] - values)
    nearest = np.abs(table(signed) - values[:, None]).min(1)
    assert found.max() <= nearest.max() * 1.0001
    # Between two decades the arithmetic keeps to the decade that the value lies in: half a bin of the wider one too far at
    # most.
    assert np.mean(found) <= 1.02 * np.mean(nearest)


def test_a_second_moment_never_vanishes():
    values = jnp.asarray([0.0, 1e-30, 1e-9, 1e-7, 1.0])
    assert np.asarray(dynamic_map.encode(values, signed=False)).tolist()[:4] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((512, 2048), (2, 2048)), ((768, 768), (3, 768)), ((50257, 768), (197, 768)), ((12, 768, 3072), (12, 3, 3072)),
     ((5000,), (20,)), ((3, 3, 4096), (3, 3, 16))],
)  # fmt: skip
def test_blocks_run_along_a_dim_that_stages_leave_alone(shape, scales):
    cut = blocks.Shape.of(shape)
    assert cut.scales(shape) == scales
    mesh = jzero.make_mesh(data=8)
    placed = jzero.shard(lambda state: (state, None), stage=1, mesh=mesh).shardings
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    spec = placed({"params": {"w": leaf}, "opt_state": {"mu": {"w": leaf}}})["opt_state"]["mu"]["w"].spec
    is_free = cut.dim >= len(spec) or spec[cut.dim] is None
    assert is_free or len([size for size in shape if size >= 32]) == 1


def test_a_block_spoils_only_itself():
    values = np.random.default_rng(0).normal(size=(1024, 300)).astype(np.float32)
    values[5, 7] = 1e4
    back = np.asarray(blocks.dequantize(*blocks.quantize(jnp.asarray(values), signed=True), signed=True))
    cut = blocks.Shape.of(values.shape)
    assert (cut.dim, cut.num_blocks) == (1, 2)
    spoiled = np.zeros(values.shape, bool)
    spoiled[5, :256] = True
    assert np.abs(back - values)[~spoiled].max() < 0.05
    assert back[5, 7] == pytest.approx(1e4)


def test_bytes_are_as_computed():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32), "b": jax.ShapeDtypeStruct((64,), jnp.float32)}
    size = lambda tx: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))
    whole = size(jzero.optim.moments_8bit(optax.adamw(1e-3)))
    assert whole == 2 * (512 * 1024 * (1 + 4 / 256) + 64 * 4) + 4
    assert whole == 2 * (blocks.num_bytes((512, 1024)) + 64 * 4) + 4
    assert size(jzero.optim.moments_bf16(optax.adamw(1e-3))) == 2 * 2 * (512 * 1024 + 64) + 8


def test_codes_and_scales_are_sharded_as_their_parameter():
    train_step, make_state = tiny.make("composed", tx=jzero.optim.moments_8bit(optax.adamw(1e-2), min_elements=64))
    step = jzero.shard(train_step, stage=3, mesh=meshes.make("8"), min_shard_elements=8)
    state = step.shardings(jax.eval_shape(make_state, tiny.make_params()))
    for moments in (state.opt_state.inner[0].mu, state.opt_state.inner[0].nu):
        assert {name: where.spec for name, where in moments.items()} == {
            name: where.spec for name, where in state.params.items()
        }
    wide = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    train_step = jzero.make_train_step(lambda p, x: jnp.mean(x @ p["w"]), jzero.optim.moments_8bit(optax.adamw(1e-2)))
    scales = jzero.shard(train_step, stage=3).shardings(jax.eval_shape(train_step.init, wide)).opt_state.scales[1]
    assert scales.spec == PartitionSpec(None, "data")


def test_rules_of_a_parameter_are_those_of_its_codes():
    tx = jzero.optim.moments_8bit(optax.adamw(1e-2))
    train_step = jzero.make_train_step(lambda p, x: jnp.mean(x @ p["w"]), tx)
    step = jzero.shard(train_step, stage=1, rules=[(r"w$", PartitionSpec("data"))])
    state = step.shardings(jax.eval_shape(train_step.init, {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}))
    assert state.opt_state.inner[0].mu["w"].spec == PartitionSpec("data")


@pytest.mark.slow
def test_nothing_travels_for_the_blocks():
    """Stage 1 and 3: the same collectives as with float32 moments."""
    wires = []
    for tx in (optax.adamw(1e-2), jzero.optim.moments_8bit(optax.adamw(1e-2), min_elements=64)):
        train_step = jzero.make_train_step(lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2), tx)
        step = jzero.shard(train_step, stage=3, mesh=meshes.make("8"))
        params = {"a": jnp.ones((256, 512)), "b": jnp.ones((512, 256))}
        report = step.report(jax.eval_shape(train_step.init, params), np.ones((8, 256), np.float32))
        wires.append({kind: figure["measured"] for kind, figure in report.wire_bytes["data"].items()})
    assert wires[0] == wires[1]


def test_bf16_keeps_the_mean_of_what_rounding_would_lose():
    """A moment that grows by a thousandth of itself stays put when rounded to nearest, and does not on average here."""
    tx = jzero.optim.moments_bf16(optax.ema(0.999, debias=False, accumulator_dtype=None))
    params = {"w": jnp.ones(4096)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(200):
        _, state = update(params, state)
    found, exact = np.asarray(state.inner.ema["w"], np.float64).mean(), 1 - 0.999**200
    assert found == pytest.approx(exact, rel=2e-3)
    nearest = jnp.zeros((), jnp.bfloat16)
    for _ in range(200):
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    assert abs(float(nearest) - exact) > 10 * abs(found - exact)


def test_a_name_that_no_moment_has():
    tx = jzero.optim.moments_8bit(optax.adamw(1e-3), nonnegative=("second",))
    with pytest.raises(ValueError, match=r"(?s)no array of the optimizer's state has this name.*second.*mu"):
        tx.init({"w": jnp.zeros((8, 8))})


@pytest.mark.slow
@pytest.mark.parametrize("make", [jzero.optim.moments_8bit, jzero.optim.moments_bf16])
def test_training_is_as_good(make):
    """Forty steps of a small network: the loss of float32 moments within 3%. `benchmarks/moments.py` holds 300 to 1%."""
    losses = []
    for wrap in (lambda tx: tx, lambda tx: make(tx, **({"min_elements": 16} if make is jzero.optim.moments_8bit else {}))):
        train_step, make_state = tiny.make("composed", tx=wrap(optax.adamw(1e-2)))
        state, step = make_state(tiny.make_params()), jax.jit(train_step)
        first = None
        for _ in range(40):
            state, metrics = step(state, tiny.batch())
            first = first or float(metrics["loss"])
        losses.append(float(metrics["loss"]))
    assert losses[0] < 0.5 * first
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
