"""The published schedules, each an order of operations per pipe stage; the tick of each follows from what it waits for.

Every operation takes one tick here, so ticks are the papers' times with forward, backward and their halves equally long.
S pipe stages, M microbatches, v chunks per pipe stage:

    schedule        ticks                    bubble                   live chunk inputs on stage s     from
    gpipe           2 (M + S - 1)            (S-1) / (M+S-1)          M                                Huang 2019
    one_f_one_b     2 (M + S - 1)            (S-1) / (M+S-1)          min(M, S - s)                    Narayanan 2019, 2021
    interleaved     2 (v M + S - 1)          (S-1) / (v M+S-1)        min(v M, 2(S-s-1) + (v-1) S + 1) Narayanan 2021
    zb_h1           3 M + S - 1              (S-1) / (3 M+S-1)        min(M, S)                        Qi 2023
    breadth_first   2 (v M + S - 1)          (S-1) / (v M+S-1)        v M                              Lamy-Poirier 2023

Interleaved as stated where S divides M, ZB-H1 and breadth-first where M >= S; other sizes run too and take longer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jzero._errors import explain, suggest
from jzero.pipeline.entry import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Entry
from jzero.pipeline.schedule import Schedule
from jzero.pipeline.validate import check_sizes

Order = list[Entry]
WHO = "jzero.schedules"


def gpipe(num_pipe_stages: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes. Holds every microbatch.

    Huang et al.: GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, 2019.
    """
    check_sizes(num_pipe_stages=num_pipe_stages, num_microbatches=num_microbatches)
    micros = range(num_microbatches)
    order = [*(Entry(FORWARD, i) for i in micros), *(Entry(BACKWARD, i) for i in micros)]
    return _timed(
        "gpipe", num_pipe_stages, num_microbatches, 1, [order] * num_pipe_stages, [num_microbatches] * num_pipe_stages
    )


def one_f_one_b(num_pipe_stages: int, num_microbatches: int) -> Schedule:
    """One forward, one backward: as few microbatches in flight as keep the last pipe stage busy.

    Narayanan et al.: PipeDream, 2019; with a flush at the end of the step (PipeDream-Flush), Narayanan et al.: Efficient
    Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, 2021.

    Example:
      >>> print(one_f_one_b(2, 3).draw())
      1f1b: 2 pipe stages, 3 microbatches; 8 ticks, bubble 0.250, live 2 1
      stage 0  F0 F1 .  B0 F2 B1 .  B2
      stage 1  .  F0 B0 F1 B1 F2 B2 .
    """
    check_sizes(num_pipe_stages=num_pipe_stages, num_microbatches=num_microbatches)
    orders = [_alternate(num_pipe_stages - stage - 1, *_singles(num_microbatches)) for stage in range(num_pipe_stages)]
    live = [min(num_microbatches, num_pipe_stages - stage) for stage in range(num_pipe_stages)]
    return _timed("1f1b", num_pipe_stages, num_microbatches, 1, orders, live)


def interleaved(num_pipe_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """1F1B over `num_chunks` smaller pieces of layers per device: a bubble smaller by that factor, for more traffic.

    Microbatches go in groups of S through one chunk after the other. Where S does not divide M the last group takes what is
    left too, and everything starts later and holds more by its excess: a smaller group would wait for itself.
    Narayanan et al.: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, 2021. With one chunk it
    is `one_f_one_b`.
    """
    check_sizes(num_pipe_stages=num_pipe_stages, num_microbatches=num_microbatches, num_chunks=num_chunks)
    if num_chunks == 1:
        return one_f_one_b(num_pipe_stages, num_microbatches)
    groups = _groups(num_pipe_stages, num_microbatches)
    forwards = [Entry(FORWARD, i, c) for group in groups for c in range(num_chunks) for i in group]
    backwards = [Entry(BACKWARD, i, c) for group in groups for c in range(num_chunks - 1, -1, -1) for i in group]
    longest = max(num_pipe_stages, len(groups[-1]))
    warmup = [2 * (num_pipe_stages - stage - 1) + (num_chunks - 1) * longest for stage in range(num_pipe_stages)]
    orders = [_alternate(count, forwards, backwards) for count in warmup]
    live = [min(len(forwards), count + 1) for count in warmup]
    return _timed("interleaved", num_pipe_stages, num_microbatches, num_chunks, orders, live)


def zb_h1(num_pipe_stages: int, num_microbatches: int) -> Schedule:
    """1F1B with its backward pass cut in two: weight gradients wait, and fill what would be bubbles. 1F1B's memory.

    Pipe stage s puts off s of them, so that every stage holds at most S microbatches.
    Qi, Wan, Huang, Lin: Zero Bubble Pipeline Parallelism, 2023, section 3.1.
    """
    check_sizes(num_pipe_stages=num_pipe_stages, num_microbatches=num_microbatches)
    orders = [_split_backward(num_pipe_stages, stage, num_microbatches) for stage in range(num_pipe_stages)]
    live = [min(num_microbatches, num_pipe_stages)] * num_pipe_stages
    return _timed("zb_h1", num_pipe_stages, num_microbatches, 1, orders, live)


def breadth_first(num_pipe_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Every microbatch through a chunk before the next chunk begins: a circular pipeline. Holds everything.

    Weights of a chunk are used in one run, which suits stages that gather them. Lamy-Poirier: Breadth-First Pipeline
    Parallelism, 2023.
    """
    check_sizes(num_pipe_stages=num_pipe_stages, num_microbatches=num_microbatches, num_chunks=num_chunks)
    forwards = [Entry(FORWARD, i, c) for c in range(num_chunks) for i in range(num_microbatches)]
    backwards = [Entry(BACKWARD, i, c) for c in range(num_chunks - 1, -1, -1) for i in range(num_microbatches)]
    orders = [[*forwards, *backwards]] * num_pipe_stages
    live = [len(forwards)] * num_pipe_stages
    return _timed("breadth_first", num_pipe_stages, num_microbatches, num_chunks, orders, live)


BY_NAME: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb_h1": zb_h1,
    "breadth_first": breadth_first,
}


def get(schedule: "str | Schedule", num_pipe_stages: int, num_microbatches: int, *, who: str = WHO) -> Schedule:
    """A schedule by name, or the user's own, validated and of these sizes."""
    if isinstance(schedule, Schedule):
        sizes = {"pipe stages": (schedule.num_pipe_stages, num_pipe_stages)}
        sizes["microbatches"] = (schedule.num_microbatches, num_microbatches)
        found = [f"{name}: {has} in the schedule, {wants} here" for name, (has, wants) in sizes.items() if has != wants]
        if found:
            fix = "Make it for the mesh's axis pipe and for accumulate microbatches, or name it: schedule='1f1b'."
            raise ValueError(explain(who, f"schedule {schedule.name!r} is of other sizes", found=found, fix=fix))
        return schedule.validate()
    if not isinstance(schedule, str) or schedule not in BY_NAME:
        found, fix = [f"schedule={schedule!r}"], "Pass a name, or a jzero.schedules.Schedule with a table of your own."
        raise ValueError(explain(who, "unknown schedule", found=found, context=suggest(schedule, BY_NAME), fix=fix))
    return BY_NAME[schedule](num_pipe_stages, num_microbatches)


def for_stages(schedule: Schedule | None, num_pipe_stages: int) -> "Schedule | str | None":
    """What to ask for on another mesh: the schedule where it fits, else one of its name; None for a user's own."""
    if schedule is None or schedule.num_pipe_stages == num_pipe_stages:
        return schedule
    return schedule.name if schedule.name in BY_NAME else None


def forward_only(schedule: Schedule) -> Schedule:
    """The forward passes of a schedule, in its order, as early as can be: what evaluation runs."""
    columns = zip(*schedule.table, strict=True)
    orders = [[entry for entry in column if entry is not None and entry.op == FORWARD] for column in columns]
    sizes = schedule.num_pipe_stages, schedule.num_microbatches, schedule.num_chunks
    timed = _timed(f"{schedule.name}, forward only", *sizes, orders, [])
    return replace(timed, claimed_live=None, only_forward=True)


def _singles(num_microbatches: int) -> tuple[Order, Order]:
    micros = range(num_microbatches)
    return [Entry(FORWARD, i) for i in micros], [Entry(BACKWARD, i) for i in micros]


def _alternate(num_warmup: int, forwards: Order, backwards: Order) -> Order:
    """Some forward passes, then forward and backward in turn, then the backward passes that are left."""
    num_warmup = min(num_warmup, len(forwards))
    num_pairs = len(forwards) - num_warmup
    pairs = zip(forwards[num_warmup:], backwards, strict=False)
    return [*forwards[:num_warmup], *(entry for pair in pairs for entry in pair), *backwards[num_pairs:]]


def _groups(size: int, num_microbatches: int) -> list[range]:
    num = max(num_microbatches // size, 1)
    return [range(i * size, num_microbatches if i == num - 1 else (i + 1) * size) for i in range(num)]


def _split_backward(num_pipe_stages: int, stage: int, num_microbatches: int) -> Order:
    forwards = [Entry(FORWARD, i) for i in range(num_microbatches)]
    order, next_forward, next_weight = forwards[: num_pipe_stages - stage - 1], num_pipe_stages - stage - 1, 0
    for micro in range(num_microbatches):
        order += forwards[next_forward : next_forward + 1]
        next_forward += 1
        order.append(Entry(INPUT_GRAD, micro))
        if micro >= stage:
            order.append(Entry(WEIGHT_GRAD, next_weight))
            next_weight += 1
    return order + [Entry(WEIGHT_GRAD, micro) for micro in range(next_weight, num_microbatches)]


def _timed(
    name: str, num_pipe_stages: int, num_microbatches: int, num_chunks: int, orders: Sequence[Order], live: Sequence[int]
) -> Schedule:
    """Every operation at the first tick that its stage's order and what it waits for allow."""
    placed = _ticks(orders, num_pipe_stages, num_microbatches, num_chunks)
    num_ticks = 1 + max(ticks[-1] for ticks in placed)
    columns = []
    for order, ticks in zip(orders, placed, strict=True):
        column: list[Entry | None] = [None] * num_ticks
        for entry, tick in zip(order, ticks, strict=True):
            column[tick] = entry
        columns.append(column)
    table = tuple(zip(*columns, strict=True))
    return Schedule(name, num_pipe_stages, num_microbatches, table, num_chunks, tuple(live))


def _ticks(orders: Sequence[Order], num_pipe_stages: int, num_microbatches: int, num_chunks: int) -> list[list[int]]:
    last = num_pipe_stages * num_chunks - 1
    forward, backward = {}, {}  # (virtual stage, microbatch) -> tick
    placed: list[list[int]] = [[] for _ in orders]
    waiting = True
    while waiting:
        waiting = progress = False
        for stage, order in enumerate(orders):
            ticks = placed[stage]
            for entry in order[len(ticks) :]:
                virtual = entry.chunk * num_pipe_stages + stage
                ready = -1  # the tick after which it can run
                if entry.op == FORWARD and virtual > 0:
                    ready = forward.get((virtual - 1, entry.microbatch))
                elif entry.op in (BACKWARD, INPUT_GRAD) and virtual < last:
                    ready = backward.get((virtual + 1, entry.microbatch))
                if ready is None:
                    waiting = True
                    break
                tick = 1 + max(ready, ticks[-1] if ticks else -1)
                ticks.append(tick)
                progress = True
                if entry.op != WEIGHT_GRAD:
                    (forward if entry.op == FORWARD else backward)[virtual, entry.microbatch] = tick
        assert progress or not waiting, "the orders of the pipe stages wait for each other"
    return placed
