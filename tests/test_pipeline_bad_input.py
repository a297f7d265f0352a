"""Every mistake that a user can make with a pipeline, before anything runs: who, what was met, and a way out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jzero
from jzero.pipeline.schedule import Schedule

WIDTH = 16
TX = optax.sgd(0.1)


def embed(p, x):
    return x @ p["in"]


def layer(p, x):
    return x + jnp.tanh(x @ p["w"])


def head(p, y, x):
    return jnp.mean((y @ p["out"]) ** 2)


def contrastive(p, y, x):
    return jnp.mean(jax.nn.logsumexp(y @ y.T, -1))


def with_statistic(p, y, x):
    return head(p, y, x) + jzero.over_batch_mean(jnp.mean(y)) ** 2


def params(num_layers=4, **changes):
    part = lambda *shape: jnp.ones(shape)
    layers = {"w": part(num_layers, WIDTH, WIDTH)}
    return {"embed": {"in": part(8, WIDTH)}, "layers": layers, "head": {"out": part(WIDTH, 4)}, **changes}


def traced(model=None, state=None, *, pipe=4, micro=4, schedule="1f1b", make=jzero.Pipeline, **options):
    """Everything up to the lowered program; nothing is compiled."""
    model = model or make(embed, layer, head)
    train_step = jzero.make_train_step(model, TX, accumulate=micro, **options)
    step = jzero.shard(train_step, stage=1, mesh=jzero.make_mesh(pipe=pipe), schedule=schedule)
    return step.lower(train_step.init(state or params()), jnp.ones((64, 8)))


def late():
    """Pipe stage 1 runs before its input has come."""
    return Schedule("late", 2, 1, [[("F", 0), ("F", 0)], [None, ("B", 0)], [("B", 0), None]])


LISTED = [{"w": jnp.ones((WIDTH, WIDTH))}] * 4
BAD = {
    "fewer layers than stages": (
        lambda: traced(state=params(3)),
        "every stage needs a layer",
        "3 layers for 4 stages",
        "up to 3",
    ),
    "fewer layers than chunks": (
        lambda: traced(state=params(6), schedule="interleaved"),
        "every stage needs a layer",
        "6 layers for 8 stages",
        "1, 2, 3, 6",
    ),
    "another number of microbatches": (
        lambda: traced(schedule=jzero.schedules.gpipe(4, 8)),
        "of other sizes",
        "microbatches: 8 in the schedule, 4 here",
        "'1f1b'",
    ),
    "another number of stages": (
        lambda: traced(schedule=jzero.schedules.gpipe(2, 4)),
        "of other sizes",
        "pipe stages: 2 in the schedule, 4 here",
        "axis pipe",
    ),
    "unknown schedule": (lambda: traced(schedule="1f2b"), "unknown schedule", "schedule='1f2b'", "Did you mean '1f1b'?"),
    "no schedule": (lambda: traced(schedule=3), "unknown schedule", "schedule=3", "table of your own"),
    "own table": (
        lambda: traced(pipe=2, micro=1, schedule=late()),
        "an activation must arrive",
        "tick 0, pipe stage 1: F0",
        "pipe stage 0",
    ),
    "a layer that widens": (
        lambda: traced(make(lambda p, x: jnp.concatenate([x, x], -1))),
        "layer 0's output does not fit",
        "out: float32[8,32]",
        "cast",
    ),
    "a layer that changes dtype": (
        lambda: traced(make(lambda p, x: layer(p, x).astype(jnp.bfloat16))),
        "does not fit",
        "in:  float32[8,16]",
        "dtype that embed",
    ),
    "integers between layers": (
        lambda: traced(jzero.Pipeline(lambda p, x: x.astype(jnp.int32), layer, head)),
        "floating-point arrays",
        "int32[8,8]",
        "floats",
    ),
    "a part is missing": (
        lambda: traced(state={"embed": jnp.ones(3), "layers": {}}),
        "an embedding, layers and a head",
        "'embed'",
        "tied",
    ),
    "unequal stacks": (
        lambda: traced(state=params(layers={"w": jnp.ones((4, 16, 16)), "b": jnp.ones(16)})),
        "agree on dim 0",
        "float32[16]",
        "stack",
    ),
    "tied twice": (lambda: traced(state=params(tied={"in": jnp.ones(3)})), "named once", "'in' in embed and in tied", "Remove"),
    "tied to an array": (
        lambda: traced(state=params(head=jnp.ones((16, 4)), tied={"a": jnp.ones(3)})),
        "merged into dicts",
        "head is a",
        "dicts",
    ),
    "split of too many layers": (
        lambda: traced(jzero.Pipeline(embed, layer, head, split=(2, 1, 1, 1))),
        "does not fit",
        "split has 5 layers",
        "4 layers",
    ),
    "split with an empty stage": (
        lambda: traced(jzero.Pipeline(embed, layer, head, split=(2, 2, 0, 0))),
        "does not fit",
        "stage 2 has 0 layers",
        "evenly",
    ),
    "examples meet": (
        lambda: traced(jzero.Pipeline(embed, layer, contrastive), pipe=2),
        "global meaning",
        "loss: examples meet",
        "data=1",
    ),
    "mean over the batch": (
        lambda: traced(jzero.Pipeline(embed, layer, with_statistic), pipe=2),
        "no means over the whole batch",
        "jzero.over_batch_mean in embed, layers or head",
        "data=1",
    ),
    "global": (lambda: traced(pipe=2, reduction="global"), "global meaning", "reduction='global'", "reduction='local'"),
    "functions and layers": (
        lambda: traced(make([layer] * 3), params(layers=LISTED)),
        "every layer has a function",
        "3 functions, 4 entries",
        "one to one",
    ),
    "no function": (lambda: jzero.Pipeline(embed, 3, head), "every part is a function", "layers=3", "Pipeline(embed="),
    "no layers": (lambda: jzero.Pipeline(embed, [], head), "every part is a function", "layers=[]", "Pipeline(embed="),
    "static leaves": (
        lambda: traced(state=params(head={"out": jnp.ones((16, 4)), "act": jnp.tanh})),
        "is an array",
        "1 leaves",
        "close over",
    ),
}


def make(layers):
    return jzero.Pipeline(embed, layers, head)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, *parts = BAD[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=r"^jzero") as caught:
        call()
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_one_pipe_stage_is_the_plain_step():
    """Without an axis pipe a pipeline is a loss like any other."""
    train_step = jzero.make_train_step(jzero.Pipeline(embed, layer, head), TX, accumulate=4)
    step = jzero.shard(train_step, stage=3, schedule="1f1b")
    assert step.options.schedule is None
    text = step.lower(train_step.init(params()), jnp.ones((64, 8))).as_text()
    assert "collective_permute" not in text
    assert "reduce_scatter" in text
