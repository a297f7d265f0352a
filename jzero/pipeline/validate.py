"""Whether a schedule's table can run: every operation once, in order, with everything it needs arrived."""

from typing import TYPE_CHECKING

from jzero._errors import explain
from jzero.pipeline.entry import BACKWARD, FORWARD, INPUT_GRAD, OPS, WEIGHT_GRAD, Entry

if TYPE_CHECKING:
    from jzero.pipeline.schedule import Schedule

WHO = "jzero.schedules"


class _Broken(Exception):
    """A violated rule: what it says, and what to do."""


def check(schedule: "Schedule") -> None:
    """Raise a five-part `ValueError` for the first rule that the table violates, with tick and pipe stage."""
    names = ("num_pipe_stages", "num_microbatches", "num_chunks")
    check_sizes(**{name: getattr(schedule, name) for name in names})
    walk = _Walk(schedule)
    for tick, row in enumerate(schedule.table):
        if len(row) != schedule.num_pipe_stages:
            problem = f"tick {tick} has {len(row)} cells for {schedule.num_pipe_stages} pipe stages"
            raise ValueError(_message(schedule, problem, [], "Give every tick one cell per pipe stage; None is idle."))
        for stage, entry in enumerate(row):
            if entry is not None:
                try:
                    walk.take(tick, stage, entry)
                except _Broken as broken:
                    rule, fix = broken.args
                    found = [f"tick {tick}, pipe stage {stage}: {entry}"]
                    raise ValueError(_message(schedule, rule, found, fix)) from None
    walk.check_complete()
    _check_live(schedule)


def live_activations(schedule: "Schedule") -> tuple[int, ...]:
    """Per pipe stage the most (microbatch, chunk) pairs between forward and the end of backward at once."""
    now, most = [0] * schedule.num_pipe_stages, [0] * schedule.num_pipe_stages
    for row in schedule.table:
        for stage, entry in enumerate(row):
            if entry is None:
                continue
            if entry.op == FORWARD:
                now[stage] += 1
                most[stage] = max(most[stage], now[stage])
            elif entry.op != INPUT_GRAD:
                now[stage] -= 1
    return tuple(most)


class _Walk:
    """The table tick by tick: when each operation of each virtual stage was done, -1 for not yet."""

    def __init__(self, schedule: "Schedule"):
        self.schedule = schedule
        self.num_virtual = schedule.num_virtual_stages
        size = self.num_virtual * schedule.num_microbatches
        self.forward, self.input_grad, self.weight_grad = [-1] * size, [-1] * size, [-1] * size

    def take(self, tick: int, stage: int, entry: Entry) -> None:
        op, micro, chunk = entry
        schedule = self.schedule
        if op not in OPS:
            raise _Broken(f"an operation is one of {', '.join(OPS)}", "B is a whole backward, I and W are its halves.")
        if not (0 <= micro < schedule.num_microbatches and 0 <= chunk < schedule.num_chunks):
            legal = f"microbatches 0 to {schedule.num_microbatches - 1} and chunks 0 to {schedule.num_chunks - 1}"
            raise _Broken(f"the table has {legal}", "Name one of them, or make the schedule larger.")
        virtual = chunk * schedule.num_pipe_stages + stage
        index = virtual * schedule.num_microbatches + micro
        if op == FORWARD:
            self._forward(tick, virtual, index)
        elif op == WEIGHT_GRAD:
            self._weight_grad(tick, index)
        else:
            self._input_grad(tick, virtual, index)
            if op == BACKWARD:
                self._once(self.weight_grad, index, "backward")
                self.weight_grad[index] = tick

    def _once(self, done: list[int], index: int, what: str) -> None:
        if done[index] >= 0:
            raise _Broken(f"{what} runs once, and ran at tick {done[index]} already", "Remove one of the two.")

    def _forward(self, tick: int, virtual: int, index: int) -> None:
        self._once(self.forward, index, "forward")
        if virtual > 0:
            self._arrived(self.forward, index - self.schedule.num_microbatches, virtual - 1, tick, "activation")
        self.forward[index] = tick

    def _input_grad(self, tick: int, virtual: int, index: int) -> None:
        self._once(self.input_grad, index, "backward")
        if not 0 <= self.forward[index] < tick:
            raise _Broken("backward comes after forward", "Run forward of this microbatch and chunk in an earlier tick.")
        if virtual < self.num_virtual - 1:
            self._arrived(self.input_grad, index + self.schedule.num_microbatches, virtual + 1, tick, "gradient")
        self.input_grad[index] = tick

    def _weight_grad(self, tick: int, index: int) -> None:
        self._once(self.weight_grad, index, "the weight gradient")
        if not 0 <= self.input_grad[index] < tick:
            raise _Broken("W comes after I", "Run I of this microbatch and chunk in an earlier tick.")
        self.weight_grad[index] = tick

    def _arrived(self, done: list[int], index: int, virtual: int, tick: int, what: str) -> None:
        """What stage and chunk `virtual` sends must have been sent in an earlier tick."""
        sent = done[index]
        if 0 <= sent < tick:
            return
        chunk, stage = divmod(virtual, self.schedule.num_pipe_stages)
        when = "nobody has sent it" if sent < 0 else f"it is sent in tick {sent}"
        source = f"pipe stage {stage}" + (f", chunk {chunk}" if self.schedule.num_chunks > 1 else "")
        raise _Broken(
            f"an {what} must arrive before it is used" if what[0] in "aeiou" else f"a {what} must arrive before it is used",
            f"It comes from {source}: {when}; what is sent in a tick can be used in the next.",
        )

    def check_complete(self) -> None:
        """Nothing is left out. The first gap by virtual stage and microbatch; its tick is the table's end."""
        schedule, num_micro = self.schedule, self.schedule.num_microbatches
        parts = (("forward", self.forward), ("backward", self.input_grad), ("the weight gradient", self.weight_grad))
        for what, done in parts[:1] if schedule.only_forward else parts:
            if -1 in done:
                virtual, micro = divmod(done.index(-1), num_micro)
                chunk, stage = divmod(virtual, schedule.num_pipe_stages)
                place = f"tick {schedule.num_ticks} (the end), pipe stage {stage}: microbatch {micro}, chunk {chunk}"
                fix = f"{done.count(-1)} of {len(done)} are missing: add them."
                raise ValueError(_message(schedule, f"{what} of every microbatch and chunk must run", [place], fix))


def check_sizes(**sizes: object) -> None:
    """Raise unless every size is a positive whole number."""
    wrong = [f"{name}={size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
    if wrong:
        fix = "One pipe stage, one microbatch and one chunk are the least."
        raise ValueError(explain(WHO, "sizes are whole numbers, 1 or larger", found=wrong, fix=fix))


def _check_live(schedule: "Schedule") -> None:
    claimed = schedule.claimed_live
    if claimed is None or claimed == schedule.live:
        return
    rows = zip(range(schedule.num_pipe_stages), claimed, schedule.live, strict=False)
    found = [f"pipe stage {stage}: claimed {said}, held {held}" for stage, said, held in rows if said != held]
    fix = "Correct claimed_live, or leave it None."
    raise ValueError(_message(schedule, "live activations are not as claimed", found or [f"claimed {claimed}"], fix))


def _message(schedule: "Schedule", problem: str, found: list[str], fix: str) -> str:
    sizes = (schedule.num_pipe_stages, schedule.num_microbatches, schedule.num_chunks)
    context = "schedule {!r}: {} pipe stages, {} microbatches, {} chunks".format(schedule.name, *sizes)
    return explain(WHO, problem, found=found, context=context, fix=fix)
