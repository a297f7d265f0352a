"""The HLO parser against stored programs of three compilers, counted by hand, and against numpy."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
from fixtures.compilers import compilers as compilers
from fixtures.hlo import make
from hypothesis import given, settings

from jzero import hlo
from jzero.hlo.loops import trip_count
from jzero.hlo.text import called

FOLDER = Path(__file__).parent / "fixtures" / "hlo"
DATA = {"cpu": 4, "tpu": 8, "gpu": 8}  # the size of `data`; `replica` is 2
LEAF = make.WIDTH * make.HIDDEN  # elements of one weight of one layer


def mesh_of(backend):
    return SimpleNamespace(axis_names=("replica", "data"), devices=np.empty((2, DATA[backend])))


def total(found, mesh, *, meant=False):
    """Elements of the full side per step by (kind, axis)."""
    table = Counter()
    for one in found:
        kind = one.meaning if meant else one.kind
        table[kind, hlo.axis_of(one.groups, mesh)] += one.elements * (1 if one.count is None else one.count)
    return dict(table)


def read(backend, program):
    text = (FOLDER / f"{backend}_{program}.txt").read_text()
    return hlo.collectives(hlo.parse(text), 2 * DATA[backend])


# Three layers of two weights. Forward and backward pass gather each; the backward pass reduces each gradient.
HAND_COUNTED = {
    "manual": lambda n: {
        ("all-gather", "data"): 2 * 3 * 2 * LEAF,
        ("reduce-scatter", "data"): 3 * 2 * LEAF,
        ("all-reduce", "replica"): 3 * 2 * LEAF // n,
        ("all-reduce", "replica+data"): 1,
    },
    "auto": lambda n: {
        ("all-gather", "data"): 2 * 3 * 2 * LEAF,
        ("reduce-scatter", "replica+data"): 3 * 2 * LEAF,
        ("all-reduce", "replica+data"): 1,
    },
    "moves": lambda n: {
        ("collective-permute", "data"): make.BATCH_PER_DEVICE * make.WIDTH,
        ("all-to-all", "data"): make.BATCH_PER_DEVICE * make.WIDTH,
        ("all-reduce", "replica"): 2 * LEAF // n,
        ("all-reduce", "replica+data"): 1,
        # the branch with two reductions, and the loop's body once
        ("all-reduce", "data"): 3 * make.BATCH_PER_DEVICE * make.WIDTH,
    },
}
STORED = [(backend, program) for backend, program in make.STORED if program in HAND_COUNTED]


MORE = [(backend, program) for backend, program in STORED if backend != "cpu" and program != "manual"]


@pytest.mark.parametrize(("backend", "program"), STORED)
def test_stored_programs_hand_counted(backend, program):
    found = read(backend, program)
    assert total(found, mesh_of(backend), meant=True) == HAND_COUNTED[program](DATA[backend])


@pytest.mark.parametrize("backend", DATA)
def test_wire_dtypes(backend):
    """bf16 on the accelerators; the CPU compiler widens."""
    dtype, size = ("f32", 4) if backend == "cpu" else ("bf16", 2)
    gathers = [one for one in read(backend, "manual") if one.kind == "all-gather"]
    assert {one.dtype for one in gathers} == {dtype}
    assert sum(one.count * one.full_bytes for one in gathers) == 12 * LEAF * size
    assert all(one.result_bytes == one.full_bytes for one in gathers)
    scatters = [one for one in read(backend, "manual") if one.kind == "reduce-scatter"]
    assert all(one.result_bytes * DATA[backend] == one.full_bytes for one in scatters)


def test_combined_gather_of_two_dtypes():
    """The GPU compiler moved one cast behind its gather: the audit must see both dtypes."""
    (mixed,) = [one for one in read("gpu", "auto") if one.dtype == "bf16+f32"]
    assert (mixed.num_ops, mixed.full_bytes, mixed.elements) == (2, LEAF * (2 + 4), 2 * LEAF)


def test_peeled_loop():
    """The GPU compiler moves the first gather of the backward loop before it: one and two, not three."""
    counts = sorted((one.loop_depth, one.count) for one in read("gpu", "manual") if one.kind == "all-gather")
    assert counts == [(0, 1), (1, 2), (1, 3)]


def test_chained_pieces_count_once():
    text = (FOLDER / "tpu_manual.txt").read_text()
    pieces = [line for line in text.splitlines() if "chain_id" in line and " all-gather(" in line]
    assert len(pieces) == 4
    assert len([one for one in read("tpu", "manual") if one.chain]) == 1


@pytest.mark.parametrize("backend", DATA)
def test_sliced_all_reduce(backend):
    found = [one for one in read(backend, "auto") if one.elements > 1 and one.kind == "all-reduce"]
    assert [one.sliced for one in found] == [True]
    assert not any(one.sliced for one in read(backend, "moves"))


def test_windowed_product_is_a_reduce_scatter():
    """Sixteen pieces of a sixteenth, and the two directions meet in one more."""
    found = read("tpu", "windowed")
    assert {(one.kind, one.meaning) for one in found} == {("collective-permute", "reduce-scatter")}
    assert sum(one.count * one.elements for one in found) == 17 * 2048 * 2048 // 16


@pytest.mark.parametrize("backend", DATA)
def test_unknown_loop(backend):
    assert [one.count for one in read(backend, "moves") if one.loop_depth] == [None]


@pytest.mark.parametrize(("backend", "program"), STORED)
def test_sources(backend, program):
    sources = {one.source.rpartition(":")[0] for one in read(backend, program)}
    assert sources == {"make.py"}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("backend", "program"),
    [("tpu", "manual"), ("gpu", "manual"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_todays_compilers(backend, program):
    """The same counts from the compilers that are installed, which may be newer than the stored texts."""
    found = hlo.collectives(hlo.parse(make.compile_text(program, backend)), 16)
    assert total(found, mesh_of(backend), meant=True) == HAND_COUNTED[program](DATA[backend])


def test_todays_cpu_compiler():
    found = hlo.collectives(hlo.parse(make.compile_text("manual", "cpu")), 8)
    assert total(found, mesh_of("cpu")) == HAND_COUNTED["manual"](4)


# spellings that the three compilers use or used, and the stored programs lack ------------------------------------------


def parse_body(body, *others):
    text = "\n\n".join(["HloModule m, num_partitions=8", *others, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}"])
    return hlo.collectives(hlo.parse(text), 8)


ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %s = f32[] add(%a, %b)\n}"


def test_scatter_fusion():
    fused = """%all-reduce-scatter.1 (q: f32[8]) -> f32[1] {
  %q = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%q), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %d = f32[1]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={1}
}"""
    body = """  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce-scatter = f32[1]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"""
    (one,) = parse_body(body, ADD, fused)
    assert (one.kind, one.elements, one.count) == ("reduce-scatter", 8, 1)


def test_async_start_of_a_wrapped_computation():
    wrapped = """%wrapped (q: f32[8]) -> f32[1] {
  %q = f32[8]{0} parameter(0)
  ROOT %r = f32[1]{0} reduce-scatter(%q), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}"""
    body = """  %p = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[1]{0}, u32[]) async-start(%p), calls=%wrapped
  %update = ((f32[8]{0}), f32[1]{0}, u32[]) async-update(%start), calls=%wrapped
  ROOT %done = f32[1]{0} async-done(%update), calls=%wrapped"""
    (one,) = parse_body(body, ADD, wrapped)
    assert (one.kind, one.full_bytes, one.result_bytes, one.channel_id) == ("reduce-scatter", 32, 4, 3)


def test_start_without_its_done_and_operands_with_types():
    body = """  %p = f32[1]{0} parameter(0)
  ROOT %s = (f32[1]{0}, f32[8]{0}) all-gather-start(f32[1]{0} %p), replica_groups={}, dimensions={0}"""
    (one,) = parse_body(body)
    assert (one.elements, one.groups) == (8, (tuple(range(8)),))


def test_true_and_false_computations():
    branch = (
        "%b{} (q: f32[8]) -> f32[8] {{\n  %q = f32[8] parameter(0)\n  ROOT %r = f32[8] all-reduce({}), replica_groups={{}}\n}}"
    )
    body = """  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8] conditional(%f, %p, %p), true_computation=%b1, false_computation=%b2"""
    (one,) = parse_body(body, branch.format(1, "%q"), branch.format(2, "%q"))
    assert one.elements == 8


def test_text_without_an_entry():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule m")


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("c128", 128), ("token", 0), ("f32", 32)]
)
def test_bits(dtype, bits):
    assert hlo.bits(dtype) == bits


# loops ---------------------------------------------------------------------------------------------------------------


def counted_loop(start, step, bound, direction, fused):
    """A `while` as the TPU compiler prints it, counter and bound at odd places, optionally behind fusions."""
    add = "%n = s32[] fusion(%i, %k), calls=%plus" if fused else "%n = s32[] add(%i, %k)"
    return f"""HloModule m

%plus (x: s32[], y: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %z = s32[] add(%x, %y)
}}

%body (t: (f32[8], s32[], s32[])) -> (f32[8], s32[], s32[]) {{
  %t = (f32[8]{{0}}, s32[], s32[]) parameter(0)
  %v = f32[8]{{0}} get-tuple-element(%t), index=0
  %i = s32[] get-tuple-element(%t), index=1
  %b = s32[] get-tuple-element(%t), index=2
  %k = s32[] constant({step})
  {add}
  %same = s32[] copy(%b)
  ROOT %next = (f32[8]{{0}}, s32[], s32[]) tuple(%v, %n, %same)
}}

%condition (t: (f32[8], s32[], s32[])) -> pred[] {{
  %t = (f32[8]{{0}}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=1
  %b = s32[] get-tuple-element(%t), index=2
  ROOT %more = pred[] compare(%i, %b), direction={direction}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %many = s32[] constant({bound})
  %state = (f32[8]{{0}}, s32[], s32[]) tuple(%p, %copied, %many)
  %loop = (f32[8]{{0}}, s32[], s32[]) while(%state), condition=%condition, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%loop), index=0
}}
"""


PASSES = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}


@settings(deadline=None)
@given(st.integers(-9, 9), st.integers(-4, 4).filter(bool), st.integers(-9, 30), st.sampled_from(sorted(PASSES)), st.booleans())
def test_trip_counts_against_running_the_loop(start, step, bound, direction, fused):
    counter, trips = start, 0
    while PASSES[direction](counter, bound) and trips < 100:
        counter, trips = counter + step, trips + 1
    module = hlo.parse(counted_loop(start, step, bound, direction, fused))
    home = module.computations[module.entry]
    counted = trip_count(home.instructions["loop"], home, module)
    assert counted == trips if trips < 100 else counted is None


def test_every_tpu_loop_of_the_stored_programs():
    module = hlo.parse((FOLDER / "tpu_manual.txt").read_text())
    loops = [
        (one, home) for home in module.computations.values() for one in home.instructions.values() if one.opcode == "while"
    ]
    assert [trip_count(one, home, module) for one, home in loops] == [3, 3]
    assert all(called(one, "body") for one, _ in loops)


COMBINED = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %e (p: f32[8,4], q: f32[16], i: s32[]) -> (f32[2,4], f32[16]) {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %both = (f32[8,4]{1,0}, f32[16]{0}) all-reduce(%p, %q), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %whole.p = f32[8,4]{1,0} get-tuple-element(%both), index=0
  %whole.q = f32[16]{0} get-tuple-element(%both), index=1
  %piece = f32[2,4]{1,0} dynamic-slice(%whole.p, %i, %zero), dynamic_slice_sizes={2,4}
  ROOT %out = (f32[2,4]{1,0}, f32[16]{0}) tuple(%piece, %whole.q)
}
"""  # noqa: E501


def test_a_combined_reduction_is_told_apart_array_by_array():
    """As the v5e compiler writes gradients: matrices of which each device keeps a piece, and vectors that stay whole."""
    found = hlo.collectives(hlo.parse(COMBINED), 4)
    assert [(one.kind, one.meaning, one.elements, one.full_bytes) for one in found] == [
        ("all-reduce", "reduce-scatter", 32, 128),
        ("all-reduce", "all-reduce", 16, 64),
    ]


MIXED = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %e (p: bf16[8,4], q: f32[16]) -> (f32[8,4], f32[16]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  ROOT %both = (f32[8,4]{1,0}, f32[16]{0}) all-reduce(%p, %q), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
}
"""  # noqa: E501


def test_a_sum_travels_in_the_dtype_it_is_made_in():
    """The TPU compiler takes the cast before a sum into it: operands in bfloat16, sums and result in float32."""
    (found,) = hlo.collectives(hlo.parse(MIXED), 4)
    assert (found.dtype, found.full_bytes, found.result_bytes) == ("f32", 4 * (32 + 16), 4 * (32 + 16))


def test_an_instruction_over_several_lines_is_one():
    """A kernel's metadata is printed so, and ends like a computation."""
    text = """HloModule m

ENTRY %e (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%p), custom_call_target="kernel", frontend_attributes={kernel_metadata={
"block":"{}"
}}, metadata={op_name="jit(f)/call"}
  ROOT %r = f32[4]{0} negate(%k)
}
"""
    module = hlo.parse(text)
    assert module.computations["e"].root == "r"
    assert 'op_name="jit(f)/call"' in module.computations["e"].instructions["k"].attributes
