"""Schedules: every table of the grid is valid, its numbers are the published ones, and its buffers hold what is read."""

import dataclasses
import itertools

import pytest

import jzero
from jzero.pipeline.entry import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Entry
from jzero.pipeline.schedule import Schedule
from jzero.pipeline.schedules import BY_NAME, breadth_first, for_stages, forward_only, gpipe, interleaved, one_f_one_b, zb_h1
from jzero.pipeline.slots import NONE, assign

STAGES, MICROBATCHES, CHUNKS = range(1, 9), range(1, 33), range(1, 5)


def work(schedule):
    """Ticks in which a pipe stage computes."""
    halves = 3 if schedule.name == "zb_h1" else 2
    return halves * schedule.num_chunks * schedule.num_microbatches


def check(schedule, live, *, ticks=None):
    """`ticks`: published length, None where the paper's condition on the sizes does not hold."""
    schedule.validate()
    assert schedule.live == live
    if ticks is None:
        return
    assert schedule.num_ticks == ticks
    assert schedule.bubble_fraction == pytest.approx(1 - work(schedule) / ticks)


@pytest.mark.parametrize("size", STAGES)
def test_grid(size):
    """Huang 2019, table 1 and section 2.3; Narayanan 2021, sections 2.2.1 and 2.2.2; Qi 2023, table 1; Lamy-Poirier 2023."""
    stages = range(size)
    for micro in MICROBATCHES:
        check(gpipe(size, micro), (micro,) * size, ticks=2 * (micro + size - 1))
        check(one_f_one_b(size, micro), tuple(min(micro, size - s) for s in stages), ticks=2 * (micro + size - 1))
        check(zb_h1(size, micro), (min(micro, size),) * size, ticks=3 * micro + size - 1 if micro >= size else None)
        for chunks in CHUNKS:
            total, fits = chunks * micro, micro >= size
            check(breadth_first(size, micro, chunks), (total,) * size, ticks=2 * (total + size - 1) if fits else None)
            if chunks > 1:
                excess = 0 if micro < size else (chunks - 1) * (micro % size)
                live = [min(total, 2 * (size - s - 1) + (chunks - 1) * size + excess + 1) for s in stages]
                ticks = 2 * (total + size - 1) if micro % size == 0 else None
                check(interleaved(size, micro, chunks), tuple(live), ticks=ticks)


def test_published_ratios():
    """The bubble as a part of the work, as the papers state it."""
    idle = lambda schedule: schedule.bubble_fraction / (1 - schedule.bubble_fraction)
    assert idle(one_f_one_b(4, 8)) == pytest.approx(3 / 8)
    assert idle(interleaved(4, 8, 4)) == pytest.approx(3 / (4 * 8))  # "reduced by v", Narayanan 2021
    assert idle(zb_h1(4, 8)) == pytest.approx(3 / (3 * 8))  # (p - 1)(F + B - W) of 3 M, "a third of 1F1B", Qi 2023


def every_schedule():
    makers = [lambda s, m, make=make: make(s, m) for make in BY_NAME.values()]
    makers += [lambda s, m: interleaved(s, m, 3), lambda s, m: breadth_first(s, m, 4)]
    return [make(s, m) for make in makers for s, m in itertools.product((1, 2, 3, 5), (1, 2, 4, 7, 12))]


def read(buffer, slot, expected):
    assert buffer.get(slot) == expected, f"slot {slot} holds {buffer.get(slot)}, not {expected}"


@pytest.mark.parametrize("schedule", every_schedule(), ids=lambda s: f"{s.name}-{s.num_pipe_stages}-{s.num_microbatches}")
def test_slots_hold_what_is_read(schedule):
    """Run the table with names for values: everything is where the slots say when it is read."""
    slots, size, last = assign(schedule), schedule.num_pipe_stages, schedule.num_virtual_stages - 1
    activations, gradients, saved, kept = ([{} for _ in range(size)] for _ in range(4))
    for cells, row in zip(slots.cells, schedule.table, strict=True):
        sent = []
        for stage, (cell, entry) in enumerate(zip(cells, row, strict=True)):
            assert (cell.op == 0) == (entry is None)
            if entry is None:
                continue
            virtual, micro = entry.chunk * size + stage, entry.microbatch
            if entry.op == FORWARD:
                if virtual == 0:
                    assert cell.embeds
                    assert cell.reads_activation == NONE
                else:
                    read(activations[stage], cell.reads_activation, (virtual, micro))
                saved[stage][cell.saved] = (virtual, micro)
                if virtual == last:
                    assert cell.ends
                    gradients[stage][cell.makes_gradient] = (virtual, micro)
                else:
                    sent.append((activations, (stage + 1) % size, "activation_arrives", (virtual + 1, micro)))
            else:
                read(saved[stage], cell.saved, (virtual, micro))
            if entry.op in (BACKWARD, INPUT_GRAD):
                read(gradients[stage], cell.reads_gradient, (virtual, micro))
                assert cell.returns == (virtual == 0)
                if virtual > 0:
                    sent.append((gradients, (stage - 1) % size, "gradient_arrives", (virtual - 1, micro)))
            if entry.op == INPUT_GRAD:
                kept[stage][cell.kept] = (virtual, micro)
            if entry.op == WEIGHT_GRAD:
                read(kept[stage], cell.kept, (virtual, micro))
        for buffer, stage, field, value in sent:
            buffer[stage][getattr(cells[stage], field)] = value
    assert slots.num_saved == max(schedule.live)


@pytest.mark.parametrize("micro", [4, 8, 32])
def test_buffers_follow_the_schedule(micro):
    """1F1B's do not grow with microbatches, GPipe's do."""
    assert assign(one_f_one_b(4, micro))[2:] == (1, 1, 4, 0)
    assert assign(zb_h1(4, micro))[2:] == (1, 1, 4, 4)
    assert assign(gpipe(4, micro)).num_saved == micro


F, B, W = FORWARD, BACKWARD, WEIGHT_GRAD
GOOD = [[(F, 0), None], [None, (F, 0)], [None, (B, 0)], [(B, 0), None]]


def changed(tick, stage, cell):
    table = [list(row) for row in GOOD]
    table[tick][stage] = cell
    return table


BAD = {
    "early_activation": (changed(0, 1, (F, 0)), "an activation must arrive", "tick 0, pipe stage 1: F0", "sent in tick 0"),
    "unsent_activation": (changed(0, 0, None), "an activation must arrive", "tick 1, pipe stage 1: F0", "nobody has sent it"),
    "early_gradient": (changed(2, 0, (B, 0)), "a gradient must arrive", "tick 2, pipe stage 0: B0", "nobody has sent it"),
    "backward_first": (changed(1, 1, (B, 0)), "backward comes after forward", "tick 1, pipe stage 1: B0", "earlier tick"),
    "twice": (changed(1, 0, (F, 0)), "forward runs once", "tick 1, pipe stage 0: F0", "ran at tick 0"),
    "missing": (changed(3, 0, None), "backward of every microbatch", "tick 4 (the end), pipe stage 0", "1 of 2 are missing"),
    "no_weight": (changed(3, 0, (INPUT_GRAD, 0)), "the weight gradient of every", "pipe stage 0: microbatch 0", "add them"),
    "weight_first": (changed(2, 1, (W, 0)), "W comes after I", "tick 2, pipe stage 1: W0", "earlier tick"),
    "whole_and_half": ([*GOOD, [(W, 0), None]], "the weight gradient runs once", "tick 4, pipe stage 0: W0", "tick 3"),
    "unknown_op": (changed(0, 0, ("X", 0)), "an operation is one of F, B, I, W", "tick 0, pipe stage 0: X0", "halves"),
    "microbatch": (changed(0, 0, (F, 1)), "microbatches 0 to 0", "tick 0, pipe stage 0: F1", "larger"),
    "chunk": (changed(0, 0, (F, 0, 1)), "chunks 0 to 0", "tick 0, pipe stage 0: F0.1", "larger"),
    "ragged": ([*GOOD[:3], [(B, 0)]], "tick 3 has 1 cells for 2 pipe stages", "2 pipe stages, 1 microbatches", "None is idle"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_table(name):
    table, *parts = BAD[name]
    with pytest.raises(ValueError, match=r"jzero\.schedules") as caught:
        Schedule("mine", 2, 1, table).validate()
    message = str(caught.value)
    assert all(part in message for part in (*parts, "schedule 'mine'")), message


def test_claimed_live_is_checked():
    schedule = Schedule("mine", 2, 1, GOOD, claimed_live=(1, 2))
    with pytest.raises(ValueError, match="claimed 2, held 1"):
        schedule.validate()
    assert dataclasses.replace(schedule, claimed_live=(1, 1)).validate().live == (1, 1)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (2.0, 1), (True, 1)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="whole numbers"):
        one_f_one_b(*sizes)


def test_time_waits_for_the_slowest():
    """Devices meet in every tick: 1F1B pairs forward with backward, ZB-H1's ticks are all alike."""
    assert gpipe(4, 8).time() == 3 * (8 + 3)
    assert one_f_one_b(4, 8).time() == 40  # 22 ticks, 18 of them with a backward pass of 2
    assert zb_h1(4, 8).time() == 3 * 8 + 3
    assert zb_h1(4, 8).waste() == pytest.approx(zb_h1(4, 8).bubble_fraction)


@pytest.mark.parametrize("make", BY_NAME.values(), ids=BY_NAME)
def test_forward_only(make):
    """Evaluation: the same forward passes in the same order, with no more than fill and drain around them."""
    schedule = make(4, 8)
    forward = forward_only(schedule).validate()
    for stage in range(4):
        passes = [[row[stage] for row in one.table if row[stage] and row[stage].op == FORWARD] for one in (schedule, forward)]
        assert passes[0] == passes[1]
    assert forward.ops == (FORWARD,)
    assert forward.num_ticks == 8 * schedule.num_chunks + 3
    assert assign(forward).num_saved == 0


def test_another_mesh_gets_the_schedule_of_that_name():
    own = Schedule("mine", 2, 1, GOOD)
    assert for_stages(zb_h1(4, 8), 2) == "zb_h1"
    assert for_stages(own, 2) is own
    assert for_stages(own, 4) is None
    assert for_stages(None, 4) is None


def test_drawings(tmp_path):
    schedule = jzero.schedules.interleaved(2, 2)
    lines = schedule.draw().splitlines()
    assert len(lines) == 3
    assert "2 chunks" in lines[0]
    for stage, line in enumerate(lines[1:]):
        cells = line.split()[2:]
        assert cells == [str(row[stage] or ".") for row in schedule.table][: len(cells)]
    path = tmp_path / "schedule.png"
    schedule.draw_png(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_entries_may_be_tuples():
    assert Schedule("mine", 2, 1, GOOD).table[0] == (Entry(F, 0), None)
