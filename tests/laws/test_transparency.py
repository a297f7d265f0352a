"""Transparency: the pass changes no value and no gradient, whatever the program does.

Every program of the table runs sharded and unsharded from one state. The optimizer is SGD with momentum: its trace is zero
before the first step and exactly the gradient after it.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import programs
import pytest
from closeness import assert_within, gaps, on_host, sizes
from compiling import quick_jit
from jax import lax
from jax.sharding import PartitionSpec

import jzero

TX = optax.sgd(1.0, momentum=0.9)
TOLERANCE = 1e-5  # relative L2 of each leaf
# What `strict` refuses, for a promise that the program really breaks; the values are right all the same. At stage 1 an opaque
# step whose loop uses the same weights in every iteration reduces their gradient in every iteration.
REDUCED_IN_LOOPS = ("nested_scans", "own_accumulation", "fori_loop", "parameters_in_the_carry", "shared_weights_in_scan")
# Under Auto axes an elementwise product of two slices of one parameter keeps both whole for its backward pass.
KEPT = ("transposed_and_split",)

pytestmark = pytest.mark.filterwarnings("ignore:.*(gradients are reduced in a loop|kept from forward to backward)")


class Way(NamedTuple):
    """How a program is sharded; `engine` is the `reduction` of jzero's own step, or "opaque"."""

    engine: str
    stage: int
    num_shards: int

    def mesh(self, tensor: int = 1) -> jax.sharding.Mesh:
        data = min(self.num_shards, len(jax.devices()) // tensor)
        return jzero.make_mesh(data=data, tensor=tensor, devices=jax.devices()[: data * tensor])

    def __str__(self) -> str:
        return f"{self.engine}, stage {self.stage}, {self.num_shards} shards"


MANUAL = [Way("auto", *rest) for rest in itertools.product((2, 3), (8, 3))]
LOCAL = [way._replace(engine="local") for way in MANUAL]
GLOBAL = [Way("global", *rest) for rest in itertools.product((3, 2), (3, 8))]
OPAQUE = [Way("opaque", *rest) for rest in itertools.product((3, 1), (8, 3))]


def ways(name: str) -> tuple[list[Way], list[Way]]:
    """The ways of one loss in `make test`, and those left to `make test-all`. Neighbours in the table go different ways."""
    loss, index = programs.LOSSES[name], list(programs.LOSSES).index(name)
    manual = LOCAL if loss.local else [] if loss.meets else MANUAL
    chosen = [*(manual[i] for i in (index % 2, 3 - index % 2) if manual), GLOBAL[index % 4]]
    chosen += [OPAQUE[0 if index % 3 else index % 4]] if loss.opaque else []
    return chosen, [way for way in [*manual, *GLOBAL, *(OPAQUE if loss.opaque else [])] if way not in chosen]


def broken_promise(name: str, way: Way) -> str:
    """What `strict` says of one program sharded one way; empty where it has nothing to say."""
    if name in REDUCED_IN_LOOPS and (way.engine, way.stage) == ("opaque", 1):
        return "gradients are reduced in a loop"
    return "kept from forward to backward" if name in KEPT and (way.engine, way.stage) == ("global", 3) else ""


class Expected(NamedTuple):
    """What a sharded run is held against: values, and how far each leaf may be off (L2)."""

    values: Any
    allowed: dict[str, float]


def within(values: Any, relative: float = TOLERANCE) -> Expected:
    host = on_host(values)
    return Expected(host, {path: relative * size for path, size in sizes(host).items()})


def gradient_of(name: str) -> Expected:
    """The loss and its gradient over the whole batch, by plain JAX."""
    loss = programs.LOSSES[name]
    values = plain_gradient(loss, loss.fn)
    if loss.exact is None:
        return within(values)
    exact = on_host(plain_gradient(loss, loss.exact))
    return Expected(exact, {path: 1.5 * gap for path, gap in gaps(on_host(values), exact).items()})


def plain_gradient(loss: programs.Loss, fn: Callable[..., Any]) -> Any:
    fn = partial(fn, mesh=Way("auto", 3, 8).mesh(loss.tensor)) if loss.on_mesh else fn
    params = loss.params()
    trains = lambda path, leaf: eqx.is_inexact_array_like(leaf) and (loss.trains is None or loss.trains(path[0].key))
    diff, rest = eqx.partition(params, jax.tree_util.tree_map_with_path(trains, params))
    value, gradient = quick_jit(jax.value_and_grad(lambda diff, *batch: fn(eqx.combine(diff, rest), *batch)))(
        diff, *programs.batch()
    )
    return {"gradient": jax.tree.leaves(gradient), "loss": value}


def own_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The step that a user would write."""

    def train_step(state: Any, *batch: Any) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return train_step


def sharded(step: jzero.ShardedStep, state: Any) -> Any:
    """One step on the batch of the table, without what is no array in the state."""
    state, aux = step(step.place(state), *programs.batch())
    arrays = eqx.filter(state, eqx.is_array_like)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(arrays)), "nothing is sharded: this tests nothing"
    return arrays, aux


def shard_loss(name: str, way: Way, **options: Any) -> tuple[jzero.ShardedStep, Any]:
    """The step of one loss and its state; its parameters and trace of gradients are what the law looks at."""
    loss = programs.LOSSES[name]
    mesh = way.mesh(loss.tensor)
    fn = partial(loss.fn, mesh=mesh) if loss.on_mesh else loss.fn
    options = {"stage": way.stage, "mesh": mesh, "min_shard_elements": 16, "strict": not broken_promise(name, way), **options}
    if way.engine == "opaque":
        params = loss.params()
        return jzero.shard(own_step(fn), **options), (params, TX.init(params))
    train_step = jzero.make_train_step(fn, TX, trainable=loss.trains, reduction=way.engine)
    return jzero.shard(train_step, **options), train_step.init(loss.params())


def check_loss(name: str, way: Way, expected: Expected) -> None:
    step, state = shard_loss(name, way)
    if way.engine == "opaque":
        (_, opt_state), value = sharded(step, state)
    else:
        report = step.report(state, *programs.batch())
        assert report.engine == ("composed (global)" if way.engine == "global" else "composed"), report.findings
        state, metrics = sharded(step, state)
        opt_state, value = state.opt_state, metrics["loss"]
    actual = on_host({"gradient": jax.tree.leaves(opt_state), "loss": value})
    assert_within(actual, expected.values, expected.allowed, f"{name}, {way}")


# What they cross, a neighbour of theirs does too; `make test-all` runs them all.
SLOW = (
    "remat_nothing", "remat_dots_no_batch", "remat_only_names", "remat_offloadless", "remat_any_names_but", "gradient_of_remat",
    "linear_systems", "sorted_parameters", "constraints_in_loops", "constraint_on_both_axes", "constraint_on_another_axis",
    "transposed_and_split", "complex_numbers", "cond_in_scan", "reversed_and_unrolled_scan", "nested_scans", "outer_powers",
    "strided_slices", "layers_stacked_again", "directional_derivative", "bfloat16_inside", "slices_beside_the_split_dim",
    "fori_loop_over_layers", "parameters_swapped_in_the_carry", "scanned_leaf_also_outside", "own_custom_vjp_in_scan",
)  # fmt: skip


def losses():
    assert set(SLOW) <= set(programs.LOSSES)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in programs.LOSSES]


@pytest.mark.parametrize("name", losses())
def test_a_loss(name):
    expected = gradient_of(name)
    for way in ways(name)[0]:
        check_loss(name, way, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", programs.LOSSES)
def test_a_loss_in_every_other_way(name):
    expected = gradient_of(name)
    for way in ways(name)[1]:
        check_loss(name, way, expected)


BROKEN = [(name, way) for name in programs.LOSSES for way in itertools.chain(*ways(name)) if broken_promise(name, way)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), BROKEN)
def test_what_strict_refuses(name, way):
    """Each exception above is one: without `strict=False` the step is an error that says so."""
    step, state = shard_loss(name, way, strict=True)
    with pytest.raises(jzero.StageNotAchieved, match=broken_promise(name, way)):
        step(step.place(state), *programs.batch())


def plain_step(fn: Callable[..., Any], state: Any, *batch: Any) -> Any:
    """One step by plain JAX; what is no array in the state is closed over."""
    arrays, rest = eqx.partition(state, eqx.is_array_like)

    def on_arrays(arrays: Any, *batch: Any) -> Any:
        state, aux = fn(eqx.combine(arrays, rest), *batch)
        return eqx.filter(state, eqx.is_array_like), aux

    return quick_jit(on_arrays)(arrays, *batch)


def after_a_step(name: str) -> Expected:
    """For SGD the state within the tolerance; for others within 3 times what another order of summation makes of it."""
    state, fn = programs.STEPS[name]()
    batch = programs.batch()
    expected = within(plain_step(fn, state, *batch))
    if name not in programs.NORMALISING:
        return expected
    reordered = plain_step(fn, state, *(rows[::-1] for rows in batch))
    noise = gaps(on_host(reordered), expected.values)
    return expected._replace(allowed={path: max(limit, 3 * noise[path]) for path, limit in expected.allowed.items()})


@pytest.mark.parametrize("name", programs.STEPS)
def test_a_step(name):
    expected = after_a_step(name)
    for way in (OPAQUE[list(programs.STEPS).index(name) % 2], OPAQUE[2 + list(programs.STEPS).index(name) // 2 % 2]):
        state, fn = programs.STEPS[name]()
        strict = not broken_promise(name, way)
        step = jzero.shard(fn, stage=way.stage, mesh=way.mesh(), min_shard_elements=16, strict=strict)
        assert_within(on_host(sharded(step, state)), expected.values, expected.allowed, f"{name}, {way}")


def test_constraints_that_are_dropped_are_listed():
    mesh = Way("auto", 3, 8).mesh()
    loss = programs.LOSSES["constraints_inside_calls"]
    train_step = jzero.make_train_step(partial(loss.fn, mesh=mesh), TX)
    findings = jzero.shard(train_step, stage=3, mesh=mesh).report(train_step.init(loss.params()), *programs.batch()).findings
    dropped = [line for line in findings if line.startswith("constraint dropped")]
    assert len(dropped) == 3, findings  # before the scan, in its body, in a branch
    assert all("P('data', None) at " in line and "outside.py:" in line for line in dropped), dropped


def test_bare_specs_under_set_mesh():
    """Under `jax.set_mesh` types hold the mesh; constraints on batch axes are dropped, the others hold."""

    def loss(p, x, t):
        h = lax.with_sharding_constraint(jnp.tanh(x @ p["w"]), PartitionSpec("data", "tensor"))
        layer = lambda h, w: (lax.with_sharding_constraint(jnp.tanh(h @ w), PartitionSpec(None, "tensor")), None)
        return jnp.mean(lax.scan(layer, h @ p["w"].T, p["layers"])[0] ** 2)

    way = Way("auto", 3, 4)
    params = programs.Loss(loss, {"w": programs.W, "layers": programs.STACK}).params()
    with jax.set_mesh(way.mesh(2)):
        values = quick_jit(jax.value_and_grad(loss))(params, *programs.batch())
        expected = within({"gradient": jax.tree.leaves(values[1]), "loss": values[0]})
        train_step = jzero.make_train_step(loss, TX)
        step = jzero.shard(train_step, stage=3, mesh=way.mesh(2), min_shard_elements=16)
        state, metrics = sharded(step, train_step.init(params))
    actual = on_host({"gradient": jax.tree.leaves(state.opt_state), "loss": metrics["loss"]})
    assert_within(actual, expected.values, expected.allowed, "bare specs")


def test_what_no_device_can_tell_from_the_others():
    """A loss that reads which shard it is has no unsharded meaning: an error, not a number."""
    train_step = jzero.make_train_step(lambda p, x, t: jnp.mean(x @ p["w"]) * lax.axis_index("data"), TX)
    step = jzero.shard(train_step, stage=3)
    with pytest.raises(NameError, match="data"):
        step.lower(train_step.init({"w": jnp.ones(programs.W)}), *programs.batch())


@pytest.mark.parametrize("engine", ["composed", "opaque"])
def test_ordered_effects_are_refused(engine):
    def loss(p, x, t):
        jax.debug.print("{w}", w=p["w"][0, 0], ordered=True)
        return jnp.mean(x @ p["w"])

    params = {"w": jnp.ones(programs.W)}
    train_step = jzero.make_train_step(loss, TX) if engine == "composed" else own_step(loss)
    state = train_step.init(params) if engine == "composed" else (params, TX.init(params))
    with pytest.raises(NotImplementedError, match="ordered effects cannot run on 8 devices"):
        jzero.shard(train_step, stage=3).lower(state, *programs.batch())
    one = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(devices=jax.devices()[:1]))
    one.lower(state, *programs.batch())
