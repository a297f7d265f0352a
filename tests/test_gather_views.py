"""Views and facts: what stays a shard, what becomes whole, and where."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jzero
from jzero.comm import Manual
from jzero.engine import compiler
from jzero.gather import Fact, constraints_on, differentiable
from jzero.gather.composed import Parts
from jzero.gather.facts import Reading, kept_use
from jzero.gather.views import dims_of

SIZES = {"data": 2}
QUICK = {"xla_backend_optimization_level": "0"}


def traced(fn, *shapes):
    """The jaxpr of `fn` for float32 arguments of these shapes."""
    return jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


# views ---------------------------------------------------------------------------------------------------------------

VIEWS = {
    "cast": (lambda w: w.astype(jnp.bfloat16), (4, 6), (0, 1)),
    "name": (lambda w: checkpoint_name(w, "w"), (4, 6), (0, 1)),
    "rounded": (lambda w: lax.reduce_precision(w, 8, 7), (4, 6), (0, 1)),
    "transpose": (lambda w: w.transpose(2, 0, 1), (4, 6, 8), (2, 0, 1)),
    "squeeze": (lambda w: w.squeeze(1), (4, 1, 8), (0, 2)),
    "new dim": (lambda w: w[:, None], (4, 8), (0, None, 1)),
    "new dims at the ends": (lambda w: lax.broadcast_in_dim(w, (1, 4, 8, 1), (1, 2)), (4, 8), (None, 0, 1, None)),
    "repeated": (lambda w: jnp.broadcast_to(w, (3, 4)), (4,), None),
    "repeated unit dim": (lambda w: jnp.broadcast_to(w, (3, 4)), (1, 4), None),
    "slice": (lambda w: lax.slice(w, (0, 2), (4, 5)), (4, 6), (0, None)),
    "strided slice": (lambda w: lax.slice(w, (0, 0), (4, 6), (1, 2)), (4, 6), (0, None)),
    "slice of everything": (lambda w: lax.slice(w, (0, 0), (4, 6)), (4, 6), (0, 1)),
    "dynamic slice": (lambda w: lax.dynamic_slice(w, (0, 1), (4, 2)), (4, 6), (0, None)),
    "split": (lambda w: jnp.split(w, 3, axis=1), (4, 6), (0, None)),
    "reshape: parted": (lambda w: w.reshape(4, 3, 2), (4, 6), (0, 1, None)),
    "reshape: merged": (lambda w: w.reshape(24, 5), (4, 6, 5), (0, 2)),
    "reshape: regrouped": (lambda w: w.reshape(5, 6, 4), (5, 4, 6), (0, 1, None)),
    "reshape: unit dims": (lambda w: w.reshape(1, 4, 1, 3, 2), (4, 1, 6), (None, 0, 1, 2, None)),
    "reshape: to a unit dim": (lambda w: w.reshape(1, 1), (1,), (0, None)),
    "reshape: unit dims moved past": (lambda w: w.reshape(6, 1), (2, 1, 3), (0, None)),
    "reshape of nothing": (lambda w: w.reshape(0, 6), (0, 4), None),
    "reversed": (lambda w: lax.rev(w, (0,)), (4, 6), None),
    "sum": (lambda w: w.sum(0), (4, 6), None),
    "scaled": (lambda w: 2 * w, (4, 6), None),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_dims_of_a_view(name):
    fn, shape, expected = VIEWS[name]
    assert dims_of(traced(fn, shape).eqns[-1]) == expected


@st.composite
def chains(draw):
    """A shape, the dim that is split in two, and a chain of operations on arrays of that rank: mostly views."""
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=3))
    split = draw(st.integers(0, len(shape) - 1))
    shape[split] = draw(st.sampled_from((2, 4, 8, 12)))
    return tuple(shape), split, draw(st.lists(st.integers(0, 2**30), min_size=1, max_size=5))


def one_view(w: Any, number: int, index: Any) -> Any:
    """The view that a random number means for `w`; `index` is known to the device alone."""
    rng = np.random.default_rng(number)
    dim = int(rng.integers(w.ndim)) if w.ndim else 0
    size = w.shape[dim] if w.ndim else 1
    part = int(rng.integers(1, size + 1))
    start = int(rng.integers(0, size - part + 1))
    views = [
        lambda: w.transpose(rng.permutation(w.ndim)),
        lambda: w.reshape(factors(rng, w.size)),
        lambda: w.reshape(*w.shape[:dim], *factors(rng, size), *w.shape[dim + 1 :]),
        lambda: w.squeeze(tuple(d for d, n in enumerate(w.shape) if n == 1)),
        lambda: jnp.expand_dims(w, int(rng.integers(w.ndim + 1))),
        lambda: lax.slice_in_dim(w, start, start + part, int(rng.integers(1, 3)), dim) if w.ndim else w,
        lambda: lax.dynamic_slice_in_dim(w, start + index, part, dim) if w.ndim else w,
        lambda: w.astype(jnp.bfloat16).astype(jnp.float32),
        lambda: jnp.split(w, [part], axis=dim)[int(part == 0)] if w.ndim else w,
        lambda: lax.optimization_barrier((w, index))[0],
        lambda: checkpoint_name(w, "w"),
        lambda: w + w,
    ]
    return views[int(rng.integers(len(views)))]()


def factors(rng, size):
    """A random shape of `size` elements."""
    shape = []
    while size > 1 and len(shape) < 3:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        shape.append(int(rng.choice(divisors)))
        size //= shape[-1]
    return (*shape, size) if size > 1 or not shape else tuple(shape)


def test_gathering_after_views_is_viewing_after_gathering():
    """... and its gradient arrives where it belongs. Values are small integers, so that equal means equal."""
    mesh = jzero.make_mesh(devices=jax.devices()[:2])
    reading, comm = Reading(False, SIZES), Manual("data")
    kept = []

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(chains())
    def hold(chain):
        shape, dim, numbers = chain

        def views(w, index):
            for number in numbers:
                w = one_view(w, number, index)
            return w

        w, index = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) % 7, jnp.int32(0)
        jaxpr = jax.make_jaxpr(views)(w, index)
        split = tuple("data" if d == dim else None for d in range(len(shape)))
        fact = Fact(0, split)
        kept.append(reading.outcome(jaxpr, (fact, None))[0] is not None)
        weights = jnp.arange(1, jaxpr.outvars[0].aval.size + 1, dtype=jnp.float32).reshape(jaxpr.outvars[0].aval.shape) % 5

        def local(shard, index):
            def objective(shard):
                arguments = [Parts(shard=shard, sink=shard), index]
                [out] = differentiable(jaxpr, (fact, None), arguments, reading=reading, comm=comm, reduce_dtype=jnp.float32)
                return jnp.sum(out * weights), out

            return jax.grad(objective, has_aux=True)(shard)

        spec = PartitionSpec(*split)
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=(spec, PartitionSpec()), check_vma=False
        )
        gradient, out = jax.jit(run, compiler_options=compiler.options(mesh) | QUICK)(w, index)
        expected, pull = jax.vjp(lambda w: views(w, index), w)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(gradient, 2 * pull(weights)[0])  # both shards have the same loss

    hold()
    assert sum(kept) > len(kept) // 3, "too few chains keep their shard to the end"


# facts ---------------------------------------------------------------------------------------------------------------

ROWS, COLUMNS, WHOLE = Fact(0, ("data", None)), Fact(0, (None, "data")), Fact(0, (None, None))
LOSS, STEP = Reading(False, SIZES), Reading(True, SIZES)


def kinds(reading, fn, *facts, shapes=((4, 6),)):
    jaxpr = traced(fn, *shapes)
    return [transfer.kind for _, _, transfer in reading.walk(jaxpr, (*facts, *(None,) * (len(shapes) - len(facts))), {})]


@pytest.mark.parametrize(
    ("fn", "in_a_loss", "in_a_step"),
    [
        (lambda w: w * 2, "use", "elementwise"),
        (lambda w: w.sum(), "use", "plain"),
        (lambda w: lax.dot(w, w.T), "use", "use"),
        (lambda w: w.T, "view", "view"),
        (lambda w: lax.rev(w, (0,)), "use", "use"),
        (lambda w: w[1:2], "use", "use"),  # along the split dim
        (lambda w: w.reshape(2, 12), "view", "view"),
        (lambda w: w.reshape(3, 8), "use", "use"),  # two shards do not divide three rows
        (lambda w: jax.jit(jnp.transpose)(w), "inline", "inline"),
        (lambda w: jax.nn.relu(w), "use", "inline"),  # a custom derivative: a loss needs its rule, a step has used it
        (lambda w: lax.optimization_barrier(w), "barrier", "barrier"),
        (lambda w: lax.cond(True, jnp.sin, jnp.cos, w), "use", "cond"),
        (lambda w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, w))[1], "use", "while"),
    ],
)
def test_what_an_operation_is(fn, in_a_loss, in_a_step):
    if in_a_step == "cond":  # a predicate that is known is no cond
        fn = lambda w, gate: lax.cond(gate.sum() > 0, jnp.sin, jnp.cos, w)
    shapes = ((4, 6), (2,)) if in_a_step == "cond" else ((4, 6),)
    assert kinds(LOSS, fn, ROWS, shapes=shapes)[-1] == in_a_loss
    assert kinds(STEP, fn, ROWS, shapes=shapes)[-1] == in_a_step


def test_an_index_that_is_tracked_makes_it_no_view():
    shapes = (jax.ShapeDtypeStruct((4, 6), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32))
    jaxpr = jax.make_jaxpr(lambda w, i: lax.dynamic_slice(w, (jnp.uint32(0), i), (4, 2)))(*shapes)
    assert LOSS.outcome(jaxpr, (ROWS, None)) == (ROWS,)
    assert LOSS.outcome(jaxpr, (ROWS, Fact(1, ()))) == (None,)


def test_the_update_takes_the_spec_of_the_operand_that_is_split():
    """A replicated parameter of stage 1 and its split moment; what comes out is the parameter's."""
    moment = Fact(1, ("data", None), is_param=False)
    [out] = STEP.outcome(traced(lambda w, m: w - 0.1 * m, (4, 6), (4, 6)), (WHOLE, moment))
    assert (out.leaf, out.split, out.is_param) == (0, ("data", None), True)


def layers(w, stack, x):
    """One matrix used outside the loop and inside, and a stack of which each turn uses a slice twice."""

    def layer(h, leaf):
        return jax.checkpoint(lambda h: h @ leaf)(h) @ leaf @ w, None

    return lax.scan(layer, x @ w, stack)[0]


SHAPES = ((6, 6), (5, 6, 6), (4, 6))
STACK = Fact(1, (None, "data", None))


def test_uses_know_how_often_they_run_and_where():
    uses = list(LOSS.uses(traced(layers, *SHAPES), (ROWS, STACK, None)))
    found = [(use.leaf, use.trips, len(use.level), use.in_remat) for use in uses]
    assert found == [(0, 1, 0, False), (1, 5, 1, True), (1, 5, 1, False), (0, 5, 1, False)]
    assert kept_use(uses) is None  # the last stands in a loop
    assert kept_use(uses[:1]) is uses[0]
    assert kept_use([]) is None


def test_a_stack_whose_layer_dim_is_split_is_gathered_before_the_loop():
    uses = list(LOSS.uses(traced(layers, *SHAPES[:1], (4, 6, 6), *SHAPES[2:]), (None, Fact(1, ("data", None, None)), None)))
    assert [(use.trips, use.eqn.primitive.name) for use in uses] == [(1, "scan")]


def test_uses_are_counted_at_each_level():
    jaxpr = traced(layers, *SHAPES)
    assert LOSS.count_uses(jaxpr, (ROWS, STACK._replace(root=1), None)) == {0: 1}  # the loop's body is a level of its own
    jitted = traced(lambda w, x: jax.jit(lambda w, x: x @ w)(w, x) @ w, (6, 6), (4, 6))
    assert LOSS.count_uses(jitted, (ROWS, None)) == {0: 2}


def carried(turn, num_turns=3):
    return lambda w: lax.fori_loop(0, num_turns, lambda i, w: turn(w), w)


@pytest.mark.parametrize(
    ("turn", "in_a_loss", "in_a_step"),
    [
        (lambda w: w, True, True),
        (lambda w: w.T.T, True, True),
        (lambda w: w.T, False, True),  # another dim is split after each turn: under Auto axes it is put back
        (lambda w: w * 0.9, False, True),  # the update, in a loop over steps
        (lambda w: w @ w, False, False),
    ],
)
def test_what_a_carry_keeps(turn, in_a_loss, in_a_step):
    jaxpr = traced(carried(turn), (6, 6))
    assert [LOSS.outcome(jaxpr, (ROWS,))[0] is not None, STEP.outcome(jaxpr, (ROWS,))[0] is not None] == [in_a_loss, in_a_step]


def test_two_carries_that_change_places_are_gathered_at_once():
    def swap(w, v, x):
        return lax.scan(lambda c, _: ((c[1], c[0], c[2] @ c[0]), None), (w, v, x), length=4)[0][2]

    uses = list(LOSS.uses(traced(swap, (6, 6), (6, 6), (4, 6)), (ROWS, ROWS._replace(leaf=1), None)))
    assert [(use.leaf, use.trips) for use in uses] == [(0, 1), (1, 1)]


def test_facts_of_one_program_do_not_leak_into_another():
    reading = Reading(False, SIZES)
    fn = jax.jit(lambda w: w.T)
    jaxpr = traced(lambda w, v: (fn(w), fn(v)), (4, 6), (4, 6))
    assert reading.outcome(jaxpr, (ROWS, None)) == (COLUMNS, None)
    assert reading.outcome(jaxpr, (COLUMNS, ROWS)) == (ROWS, COLUMNS)


def test_constraints_are_found_wherever_they_stand():
    mesh = jzero.make_mesh(data=4, tensor=2)
    pin = lambda x, *names: lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*names)))

    def program(x):
        x = lax.scan(lambda h, _: (jax.jit(lambda h: pin(h, "data"))(h), None), x, length=2)[0]
        x = lax.cond(x.sum() > 0, lambda x: pin(x, None, ("tensor", "data")), lambda x: pin(x, "tensor"), x)
        return pin(x, None, "tensor")

    lines = constraints_on(traced(program, (4, 6)), ("replica", "data"))
    assert sorted(line.partition(" at ")[0] for line in lines) == ["P('data',)", "P(None, ('tensor', 'data'))"]
    assert all("test_gather_views.py" in line for line in lines)
