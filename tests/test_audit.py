"""Measurements of compiled programs against arithmetic, and the report that prints them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jzero import audit as audits
from jzero.report import WIDTH, Report, human

N = 4


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, N), ("replica", "data"), axis_types=(AxisType.Auto,) * 2)


def compile_manual(mesh, function, *args, out, donate=()):
    """`function` on one device's pieces; args are (shape, spec) of f32 arrays."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in args]
    local = jax.shard_map(function, mesh=mesh, in_specs=tuple(spec for _, spec in args), out_specs=out, check_vma=False)
    return jax.jit(local, donate_argnums=donate).lower(*shapes).compile()


# What one device's link carries of 4096 floats in a group of four.
RING = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P(), 4096 * 3 // 4),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"), 4096 * 3 // 4),
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), P(), P(), 2 * 4096 * 3 // 4),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), P(), P(), 4096 * 3 // 4),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % N) for i in range(N)]), P(), P(), 4096),
}


@pytest.mark.parametrize("kind", RING)
def test_ring_formulas(mesh, kind):
    function, spec, out, elements = RING[kind]
    measured = audits.audit(compile_manual(mesh, function, ((4096,), spec), out=out), mesh)
    assert measured.wire_elements == {"data": {kind: elements}}
    assert measured.wire_bytes == {"data": {kind: 4 * elements}}


def test_loops_and_axes(mesh):
    def function(x):
        body = lambda y, _: (jax.lax.psum(y, "data"), jax.lax.psum(y.sum(), ("replica", "data")))
        return jax.lax.scan(body, x, length=5)

    measured = audits.audit(compile_manual(mesh, function, ((64,), P()), out=P()), mesh)
    assert measured.wire_elements["data"] == {"all-reduce": 5 * 2 * 64 * 3 // 4}
    assert measured.wire_elements["replica+data"] == {"all-reduce": 5 * 2 * 7 // 8}
    assert len(audits.in_loops(measured, "all-reduce")) == 2
    assert not audits.in_loops(measured, "all-gather")


def test_reduce_scatter_in_meaning(mesh):
    """The CPU compiler reduces everything and slices: twice the traffic of what was meant."""
    split = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.tanh(x @ w).sum()), out_shardings=split)
    measured = audits.audit(gradient.lower(w, x).compile(), mesh)
    (one,) = measured.collectives
    assert (one.kind, one.sliced, audits.meaning(one)) == ("all-reduce", True, "reduce-scatter")
    assert audits.wire(measured.collectives, mesh, elements=True) == {"data": {"all-reduce": 2 * 64 * 32 * 3 // 4}}
    as_meant = audits.wire(measured.collectives, mesh, elements=True, as_meant=True)
    assert as_meant == {"data": {"reduce-scatter": 64 * 32 * 3 // 4}}


def test_parameters_and_donation(mesh):
    compiled = compile_manual(mesh, lambda a, b, c: (a + b, c * 2), *[((64,), P("data"))] * 3, out=P("data"), donate=(0,))
    measured = audits.audit(compiled, mesh)
    assert [parameter.aliased for parameter in measured.parameters] == [True, False, False]
    assert [parameter.bytes for parameter in measured.parameters] == [64] * 3
    assert measured.aliased == (0,)
    assert (measured.argument_bytes, measured.alias_bytes) == (3 * 64, 64)
    assert measured.output_bytes >= 2 * 64
    assert measured.peak_bytes >= measured.argument_bytes


def test_parameter_names(mesh):
    state = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    measured = audits.audit(jax.jit(lambda state: state["w"] + 1).lower(state).compile(), mesh)
    assert [parameter.name for parameter in measured.parameters] == ["state['w']"]


def test_no_collectives_on_one_device():
    alone = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    measured = audits.audit(compile_manual(alone, lambda x: jax.lax.psum(x, "data"), ((8,), P()), out=P()), alone)
    assert measured.wire_bytes == {}


def test_findings(mesh):
    def function(x):
        again = jax.lax.while_loop(lambda y: y[0] < 3, lambda y: jax.lax.psum(y, "data"), x)
        return again + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    measured = audits.audit(compile_manual(mesh, function, ((8,), P()), out=P()), mesh)
    (shuffle,), (unknown,) = audits.shuffles(measured), audits.unknown_loops(measured)
    line = audits.describe(shuffle, mesh)
    assert line.startswith("collective-permute over 'data' of f32[8], 1 times a step, from ")
    assert "test_audit.py:" in line
    assert "an unknown number of times" in audits.describe(unknown, mesh)
    assert measured.wire_bytes["data"]["all-reduce"] == 2 * 32 * 3 // 4
    gathers = audits.audit(compile_manual(mesh, RING["all-gather"][0], ((8,), P("data")), out=P()), mesh)
    assert len(audits.gathered_in(gathers, "f32")) == 1
    assert not audits.gathered_in(gathers, "bf16")


def test_bytes_at_rest(mesh):
    leaf = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    split, both = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P(("replica", "data")))
    tree = {"a": leaf(3, 8), "b": leaf(16, dtype=jnp.bfloat16), "c": leaf(5)}
    assert audits.bytes_at_rest(tree, {"a": split, "b": both, "c": NamedSharding(mesh, P())}) == 3 * 2 * 4 + 2 * 2 + 5 * 4
    assert audits.shard_bytes(leaf(5), None) == 20
    assert audits.shard_bytes(jax.eval_shape(jax.random.key, 0), NamedSharding(mesh, P())) == 8


# the report ----------------------------------------------------------------------------------------------------------


LEAF = {
    "path": "layers/w1", "dtype": "float32", "shape": (8, 1024), "role": "params", "spec": "PartitionSpec(None, 'data')",
    "bytes_per_device": 2048, "why": "the largest dim",
}  # fmt: skip


def make_report(**changes):
    params = {"measured": 41_500_000, "formula": 41_500_000}
    fields = {
        "stage": 3,
        "engine": "composed",
        "mesh": {"data": np.int64(16)},
        "bytes_at_rest": {"params": params, "other": {"measured": 12, "formula": None}},
        "wire_bytes": {"data": {"all-gather": {"measured": 534_000_000, "formula": 500_000_000}}},
        "temp_bytes": np.int64(637_000_000),
        "peak_bytes": 12_345_678_901,
        "leaves": [LEAF],
        "findings": ["layers/b float32[3] stays whole: " + "too small " * 30],
        "programs": {"step": {"temp_bytes": 1}},
    }
    return Report(**(fields | changes))


def test_report_as_data():
    data = json.loads(json.dumps(make_report().to_dict()))
    assert {"bytes_at_rest", "wire_bytes", "temp_bytes", "peak_bytes", "leaves", "findings"} <= set(data)
    assert data["bytes_at_rest"]["params"] == {"measured": 41_500_000, "formula": 41_500_000}
    assert data["wire_bytes"]["data"]["all-gather"]["formula"] == 500_000_000
    assert data["mesh"] == {"data": 16}
    assert data["leaves"][0]["shape"] == [8, 1024]


def test_report_as_text():
    text = str(make_report())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\x1b" not in text
    for expected in ("Stage 3, composed engine, mesh data=16", "534 MB", "500 MB", "1.07", "12.3 GB", "- layers/b", "41.5 MB"):
        assert expected in text
    assert "No findings" in str(make_report(findings=()))


def test_leaf_table():
    text = make_report().leaf_table()
    assert max(map(len, text.splitlines())) <= WIDTH
    for expected in ("layers/w1", "float32[8,1024]", "params", "2.0 kB", "the largest dim"):
        assert expected in text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (637e6, "637 MB"), (1869e6, "1,869 MB"), (2e10, "20.0 GB"), (None, "-")],
)
def test_human(num_bytes, text):
    assert human(num_bytes) == text
