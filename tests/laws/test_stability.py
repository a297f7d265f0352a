"""Stability law: one program for every call, the old state's memory in the new one, and the caller's own arrays untouched."""

import contextlib

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import jzero
from jzero import audit, remat

STAGES = (0, 1, 2, 3)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
everywhere = pytest.mark.parametrize("mesh", ["1", "8", "2x4"])
every_stage = pytest.mark.parametrize("stage", STAGES)
every_engine = pytest.mark.parametrize("engine", tiny.ENGINES)


@contextlib.contextmanager
def compilations():
    """A list with one entry for every program that is compiled inside the block."""
    seen = []

    def note(event, *_, **__):
        if event == COMPILE_EVENT:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def make(engine="opaque", stage=3, mesh="8"):
    train_step, make_state = tiny.make(engine)
    step = jzero.shard(train_step, stage=stage, mesh=meshes.make(mesh), min_shard_elements=64)
    return step, make_state(tiny.make_params())


def kinds(state):
    """What must not change from step to step."""
    return [
        (leaf.shape, leaf.dtype, leaf.sharding, getattr(leaf, "weak_type", False), leaf.committed)
        for leaf in jax.tree.leaves(state)
    ]


def pointers(state):
    """Where every device's piece of every leaf lies."""
    arrays = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [[shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] for array in arrays]


def test_the_counter_counts():
    with compilations() as seen:
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(np.ones(3, np.float32)))
    assert len(seen) == 1


@everywhere
@every_stage
@every_engine
def test_every_call_after_the_first(engine, stage, mesh):
    """Compiles nothing, leaves the state's kind alone, and writes the new state over the old one's memory."""
    step, state = make(engine, stage, mesh)
    state = step.place(state)
    at_first = kinds(state)
    state, _ = step(state, tiny.batch())
    for _ in range(3):
        assert kinds(state) == at_first
        old, before = state, pointers(state)
        with compilations() as seen:
            state, _ = jax.block_until_ready(step(state, tiny.batch()))
        assert not seen
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert pointers(state) == before
    (program,) = step._programs.values()
    inputs = audit.audit(program.compiled, step.mesh).parameters
    assert [one.aliased for one in inputs] == [one.name.startswith("state") for one in inputs]
    assert len(inputs) == len(at_first) + 1  # the batch


@every_engine
def test_a_state_from_init_is_of_the_same_kind_as_a_placed_one(engine):
    step, state = make(engine)
    _, make_state = tiny.make(engine)
    born = step.init(lambda: make_state(tiny.make_params()))
    assert kinds(born) == kinds(step.place(state))
    placed, _ = step(step.place(state), tiny.batch())
    with compilations() as seen:
        born, _ = jax.block_until_ready(step(born, tiny.batch()))
    assert not seen
    assert kinds(born) == kinds(placed)


def test_batches_of_numpy_and_of_jax_and_committed_ones_share_a_program():
    step, state = make()
    split = NamedSharding(step.mesh, PartitionSpec("data"))
    state = step.place(state)
    for batch in (tiny.batch(), jnp.asarray(tiny.batch()), jax.device_put(tiny.batch(), split)):
        state, _ = step(state, batch)  # jax itself compiles a slice of an array that must be split
        with compilations() as seen:
            state, _ = jax.block_until_ready(step(state, batch))
        assert not seen
    assert len(step._programs) == 1


@every_engine
def test_alternating_batch_shapes_compile_once_each(engine):
    step, state = make(engine)
    state = step.place(state)
    at_first = kinds(state)
    for rows in (8, 16):
        state, _ = step(state, tiny.batch(rows))
    with compilations() as seen:
        for rows in (8, 16, 16, 8):
            state, _ = jax.block_until_ready(step(state, tiny.batch(rows)))
    assert not seen
    assert len(step._programs) == 2
    assert kinds(state) == at_first


# The caller's arrays -------------------------------------------------------------------------------------------------------


def as_single(tree, mesh):
    return tree


def as_replicated(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def as_elsewhere(tree, mesh):
    return jax.device_put(tree, jax.devices()[3])


def as_numpy(tree, mesh):
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf), tree)


SOURCES = {"one device": as_single, "replicated": as_replicated, "another device": as_elsewhere, "numpy": as_numpy}


def values(state):
    keys = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [np.array(keys(leaf)) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("stage", "mesh"), [(0, "8"), (3, "8"), (3, "1"), (1, "2x4")])
@every_engine
def test_the_callers_arrays_survive_place(engine, stage, mesh, source):
    """Replicated leaves too, whose piece on one device could be the caller's own buffer."""
    step, state = make(engine, stage, mesh)
    state = SOURCES[source](state, step.mesh)
    before = values(state)
    jax.block_until_ready(step(step.place(state), tiny.batch()))
    assert all(map(np.array_equal, values(state), before))


@every_stage
def test_a_state_that_stands_right_already_is_copied(stage):
    step, state = make(stage=stage)
    placed = step.place(state)
    before = values(placed)
    again = step.place(placed)
    assert kinds(again) == kinds(placed)
    jax.block_until_ready(step(again, tiny.batch()))
    assert all(map(np.array_equal, values(placed), before))


@every_stage
def test_one_array_twice_in_a_state(stage):
    """Donating one buffer twice is an error of the runtime's; `place` gives every leaf its own."""
    step, state = make(stage=stage)
    shared = {**state, "old": state["params"]}
    tied = jzero.shard(
        lambda s, x: ({**step.fn({k: s[k] for k in state}, x)[0], "old": s["old"]}, None),
        stage=stage,
        mesh=step.mesh,
        params=lambda s: s["params"],
    )
    placed = tied.place(shared)
    flat = [pointer for leaf in pointers(placed) for pointer in leaf]
    assert len(set(flat)) == len(flat)
    after, _ = tied(placed, tiny.batch())
    assert all(map(np.array_equal, values(after["old"]), values(state["params"])))


def test_without_donation_the_old_state_stays():
    train_step, make_state = tiny.make("opaque")
    step = jzero.shard(train_step, stage=3, mesh=meshes.make("8"), min_shard_elements=64, donate=False)
    state = step.place(make_state(tiny.make_params()))
    before = values(state)
    jax.block_until_ready(step(state, tiny.batch()))
    assert all(map(np.array_equal, values(state), before))


# Leaves that jit would give another kind -----------------------------------------------------------------------------------


def counting_step(state, x):
    """Python scalars come in as weak types; sums with literals give weak types back."""
    grads = jax.grad(tiny.loss_fn)(state["params"], x)
    params = jax.tree.map(lambda leaf, grad: leaf - state["rate"] * grad, state["params"], grads)
    return {"params": params, "rate": state["rate"] * 0.5, "count": state["count"] + 1, "done": state["done"]}, None


@pytest.mark.parametrize("start", ["place", "init", "as they are"])
def test_python_scalars_in_a_state(start):
    step = jzero.shard(counting_step, stage=3, mesh=meshes.make("8"), min_shard_elements=64)
    make_state = lambda: {"params": tiny.make_params(), "rate": 0.5, "count": 0, "done": False}
    state = {"place": lambda: step.place(make_state()), "init": lambda: step.init(make_state), "as they are": make_state}[
        start
    ]()
    at_first = None if start == "as they are" else kinds(state)
    state, _ = step(state, tiny.batch())
    after_one = kinds(state)
    assert at_first in (None, after_one)
    with compilations() as seen:
        for _ in range(2):
            state, _ = jax.block_until_ready(step(state, tiny.batch()))
    assert not seen
    assert len(step._programs) == 1
    assert kinds(state) == after_one
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert (float(state["rate"]), int(state["count"]), bool(state["done"])) == (0.0625, 3, False)


def test_weak_types_in_a_state_become_strong_once():
    step = jzero.shard(
        counting_step, stage=1, mesh=meshes.make("8"), min_shard_elements=64, params=lambda state: state["params"]
    )
    weak = {"params": tiny.make_params(), "rate": jnp.asarray(0.5), "count": jnp.asarray(0), "done": jnp.asarray(False)}
    assert weak["rate"].weak_type
    state = step.place(weak)
    at_first = kinds(state)
    state, _ = step(state, tiny.batch())
    assert kinds(state) == at_first
    assert len(step._programs) == 1


def test_schedules_and_counters_keep_one_program():
    """`inject_hyperparams` and a schedule change values in the state from step to step, never its kind."""
    tx = optax.chain(
        optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1e-3, 0.0, 3)),
        optax.apply_if_finite(optax.sgd(0.1), 2),
    )
    for engine in tiny.ENGINES:
        train_step, make_state = tiny.make(engine, tx=tx)
        step = jzero.shard(train_step, stage=2, mesh=meshes.make("2"), min_shard_elements=64)
        state = step.place(make_state(tiny.make_params()))
        at_first = kinds(state)
        for _ in range(3):
            state, _ = step(state, tiny.batch())
            assert kinds(state) == at_first
        assert len(step._programs) == 1


def test_a_second_step_of_the_same_loss_is_the_same_program():
    """Where layers ask for the remat policy themselves: what jax remembers of a loss must not make it forget them."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(w, x):
        return jnp.sum(jax.lax.scan(remat.wrap_layer(layer), x, w)[0])

    shapes = jax.ShapeDtypeStruct((4, 24, 24), jnp.float32), jax.ShapeDtypeStruct((8, 24), jnp.float32)
    programs = [str(jax.make_jaxpr(jax.grad(remat.apply(loss, remat.get("full"))))(*shapes)) for _ in range(2)]
    assert programs[0] == programs[1]
    assert programs[0].count("remat") > 0
