"""Where examples meet: every verdict is held against numbers.

A loss that is said to be a mean (or a sum) must be the mean (sum) of its shards' losses, and so must its gradient.
A loss in the table of mixed ones must be said to be mixed, and the numbers must really differ.
"""

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reduction_losses
from hypothesis import given, settings
from jax import lax
from reduction_losses import (
    MEANS,
    MIXED,
    ONLY_GRADIENTS_MIX,
    SUMS,
    B,
    D,
    V,
    batch_norm,
    ce,
    centered_loss,
    in_batch_negatives,
    load_balance,
    logits_of,
    make_batch,
    make_params,
    token_logits,
    verdict_of,
)

from jzero.reduction import (
    INDEPENDENT,
    Mixed,
    PerExample,
    Sum,
    analyze,
    explain_mixed,
    is_independent,
    is_mean,
    is_per_example,
    is_sum,
)
from jzero.reduction.control import STEPS
from jzero.reduction.states import Shapes, fits
from jzero.reduction.walk import RULES

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the compile time


def measured(losses: dict[str, Callable], num_shards: int, *, gradients: bool = True) -> dict[str, list]:
    """Of each loss the value (and gradient) in float64, shard by shard. One program for all: compilation is the cost."""

    def program(p, b):
        functions = {name: lambda p, loss=loss: jnp.asarray(loss(p, b), jnp.float64) for name, loss in losses.items()}
        return {name: jax.value_and_grad(f)(p) if gradients else (f(p), {}) for name, f in functions.items()}

    with jax.enable_x64(True):
        params, batch = make_params(), make_batch()
        rows = B // num_shards
        shards = [jax.tree.map(lambda leaf, i=i: leaf[i * rows : (i + 1) * rows], batch) for i in range(num_shards)]
        run = jax.jit(program).lower(params, shards[0]).compile(UNOPTIMISED)
        results = [jax.device_get(run(params, shard)) for shard in shards]
    return {name: [result[name] for result in results] for name in losses}


def combined(combine: Callable, shards: list):
    return jax.tree.map(lambda *leaves: combine(leaves), *shards)


def difference(whole, combined) -> float:
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(combined), strict=True)
    return max(np.abs(a - b).max() / max(np.abs(a).max(), 1e-3) for a, b in pairs)


def mean_of(parts):
    return sum(parts) / len(parts)


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_recognised(name):
    [state] = verdict_of(MEANS[name], make_params(), make_batch()).outputs
    assert is_mean(state), explain_mixed(state)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_recognised(name):
    [state] = verdict_of(SUMS[name], make_params(), make_batch()).outputs
    assert is_sum(state), explain_mixed(state)


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_loss_is_refused(name):
    [state] = verdict_of(MIXED[name], make_params(), make_batch()).outputs
    assert not is_mean(state), name
    assert not is_sum(state), name


@pytest.mark.parametrize(("losses", "combine"), [(MEANS, mean_of), (SUMS, sum)], ids=["means", "sums"])
def test_shards_make_the_whole(losses, combine):
    """Values and gradients of two shards, values of three."""
    wholes, halves, thirds = measured(losses, 1), measured(losses, 2), measured(losses, 3, gradients=False)
    found = {name: difference(wholes[name][0], combined(combine, halves[name])) for name in losses}
    found |= {f"{name}, 3": difference((wholes[name][0][0], {}), combined(combine, thirds[name])) for name in losses}
    wrong = {name: d for name, d in found.items() if d > 1e-6}  # jax's attention takes its softmax in fp32
    assert not wrong


@pytest.mark.parametrize("only_gradients", [False, True])
def test_mixed_losses_really_differ(only_gradients):
    """From the mean of their halves, and from the sum: values, or gradients where the values are a mean's."""
    losses = {name: loss for name, loss in MIXED.items() if (name in ONLY_GRADIENTS_MIX) == only_gradients}
    wholes, halves = (measured(losses, n, gradients=only_gradients) for n in (1, 2))
    nearest = {n: min(difference(wholes[n][0], combined(c, halves[n])) for c in (mean_of, sum)) for n in losses}
    fine = {name: d for name, d in nearest.items() if d < 1e-4}
    assert not fine


@pytest.mark.parametrize("factor", [3, 8])
def test_the_number_of_shards_can_be_given(factor):
    for table, holds in ((MEANS, is_mean), (SUMS, lambda state: is_sum(state, factor=factor))):
        for name in list(table)[:4]:
            [state] = verdict_of(table[name], make_params(), make_batch(), factor=factor).outputs
            assert holds(state), f"{name}: {explain_mixed(state)}"


def test_a_divisor_that_stops_growing_is_seen_at_the_true_sizes():
    loss = lambda p, b: jnp.sum(logits_of(p, b)) / max(b["x"].shape[0], 8)
    assert is_mean(verdict_of(loss, make_params(), make_batch()).outputs[0])  # 12 against 24
    assert not is_mean(verdict_of(loss, make_params(), make_batch(), size=4, factor=3).outputs[0])  # 4 against 12


@pytest.mark.parametrize(
    "name", ["optax labels", "indexing tokens", "scan over layers, remat", "attention", "recurrent, time-major"]
)
def test_a_local_batch_of_one(name):
    assert is_mean(verdict_of(MEANS[name], make_params(), make_batch(), size=1, factor=16).outputs[0])


def test_aux_outputs_are_judged_one_by_one():
    def loss(p, b):
        logits, features = logits_of(p, b), b["z"] @ p["w"]
        return {
            "a loss": ce(logits, b["y"]).mean(),
            "b accuracy": jnp.mean(logits.argmax(-1) == b["y"]),
            "c each": ce(logits, b["y"]),
            "d time first": features.swapaxes(0, 1),
            "e counts": jnp.zeros(V, jnp.int32).at[b["y"]].add(1),
            "f norm": optax.tree.norm(p),
            "g size": jnp.float32(b["x"].shape[0]),
            "m perplexity": jnp.exp(ce(logits, b["y"]).mean()),
            "h ones": jnp.ones((b["x"].shape[0], 2)),
            "i time major": features.swapaxes(0, 1).reshape(-1, V),
            "j scaled": features / b["x"].shape[0],
            "k places": jnp.arange(b["x"].shape[0]),
            "l twice": jnp.concatenate([b["x"], b["x"]]),
        }

    outputs = verdict_of(loss, make_params(), make_batch()).outputs
    good = [Sum(1), Sum(1), PerExample(0), PerExample(1), Sum(2), INDEPENDENT, Sum(2), PerExample(0)]
    wanted = [*good, Mixed, Mixed, Mixed, Mixed, Mixed]
    assert [Mixed if isinstance(state, Mixed) else state for state in outputs] == wanted
    assert is_independent(outputs[5])
    assert is_per_example(outputs[2], 0)
    assert not is_per_example(outputs[3], 0)


def test_a_weighted_loss_is_two_sums():
    def loss(p, b):
        return jnp.sum(ce(token_logits(p, b), b["t"]) * b["mask"]), b["mask"].sum()

    outputs = verdict_of(loss, make_params(), make_batch()).outputs
    assert all(map(is_sum, outputs))
    parts = {"sum": lambda p, b: loss(p, b)[0], "weight": lambda p, b: loss(p, b)[1] * (1 + 0 * p["gate"])}
    whole = {"whole": lambda p, b: loss(p, b)[0] / loss(p, b)[1]}
    results, [wanted] = measured(parts, 3), measured(whole, 1)["whole"]
    (total, gradient), (weight, _) = (jax.tree.map(lambda *s: sum(s), *results[name]) for name in ("sum", "weight"))
    assert difference(wanted, (total / weight, jax.tree.map(lambda g: g / weight, gradient))) < 1e-12


@pytest.mark.parametrize("name", ["masked mean", "guarded masked mean", "mean where"])
def test_a_quotient_of_sums_is_told_of_weighted(name):
    assert "jzero.weighted(sum, weight)" in explain_mixed(verdict_of(MIXED[name], make_params(), make_batch()).outputs[0])


@pytest.mark.parametrize(
    ("loss", "marker", "primitive"),
    [
        (in_batch_negatives, "in-batch negatives", "dot_general"),
        (batch_norm, "batch statistics", "sub"),
        (centered_loss, "loss minus its mean", "sub"),
        (load_balance, "load balance", "integer_pow"),
    ],
)
def test_the_finding_names_line_function_and_primitive(loss, marker, primitive):
    lines = Path(reduction_losses.__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith(f"# LINE: {marker}"))
    verdict = verdict_of(loss, make_params(), make_batch())
    assert verdict.findings == (f"{reduction_losses.__file__}:{number} ({loss.__name__}): {verdict.outputs[0].reason}",)
    assert verdict.outputs[0].reason.startswith(f"`{primitive}`")
    assert f"{reduction_losses.__file__}:{number}" in explain_mixed(verdict.outputs[0])


def test_a_library_line_comes_with_the_call_of_the_user():
    norm = nn.BatchNorm(use_running_average=False)
    params = jax.eval_shape(norm.init, jax.random.key(0), jnp.zeros((1, D)))

    def loss(p, b):
        out, new = norm.apply(p, b["x"], mutable=["batch_stats"])
        return jnp.mean(out**2), new

    mean, *_ = verdict_of(loss, params, make_batch()).outputs
    assert "normalization.py" in mean.where
    assert f"called from {__file__}" in mean.where


def test_a_cached_library_trace_does_not_name_its_first_caller():
    def first(p, b):
        return jnp.var(b["x"])

    def second(p, b):
        return jnp.var(b["x"])

    wheres = [verdict_of(loss, make_params(), make_batch()).outputs[0].where for loss in (first, second)]
    assert "first" in wheres[0]
    assert "second" in wheres[1]


@pytest.mark.parametrize(
    "by_size",
    [
        lambda h, is_small: h.mean() if is_small else jnp.sin(h).mean(),
        lambda h, is_small: (jnp.cos(h) if is_small else jnp.sin(h)).mean(),
        lambda h, is_small: lax.switch(jnp.int32(h.ndim), 3 * [jnp.sin] if is_small else 4 * [jnp.sin], h).mean(),
        lambda h, is_small: jnp.subtract(*[jnp.sin(h), jnp.sin(2 * h)][:: 1 if is_small else -1]).mean(),
    ],
    ids=["longer", "other primitive", "other branches", "other wiring"],
)
def test_a_program_that_depends_on_the_batch_size(by_size):
    state = verdict_of(lambda p, b: by_size(b["x"], b["x"].shape[0] < 20), make_params(), make_batch()).outputs[0]
    assert "depends on the batch size" in state.reason


def test_a_loss_that_only_traces_at_one_batch_size():
    table = jnp.ones((B, V))
    state = verdict_of(lambda p, b: jnp.mean(table * logits_of(p, b)), make_params(), make_batch()).outputs[0]
    assert "cannot be traced at 2 times the batch size" in state.reason


def test_random_draws_by_example_stay_per_example():
    def loss(p, key, b):
        mask = jax.random.bernoulli(key, 0.9, b["x"].shape)
        noise = jax.vmap(lambda k: jax.random.normal(k, (D,)))(jax.random.split(key, b["x"].shape[0]))
        folded = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.arange(b["x"].shape[0]))
        picked = jax.random.categorical(key, logits_of(p, b))
        return jnp.where(mask, b["x"], 0.0).mean() + (noise * b["x"]).mean() + jnp.mean(folded * picked)

    for impl in ("threefry2x32", "rbg"):
        key = jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl))
        assert is_mean(verdict_of(loss, make_params(), make_batch(), rng=key).outputs[0])


def test_a_shuffle_of_the_batch_is_mixed():
    key = jax.eval_shape(lambda: jax.random.key(0))
    mixup = lambda p, key, b: jnp.mean((b["x"] + b["x"][jax.random.permutation(key, b["x"].shape[0])]) @ p["w"])
    assert isinstance(verdict_of(mixup, make_params(), make_batch(), rng=key).outputs[0], Mixed)


def test_what_cannot_be_seen_is_mixed_and_prints_are_ignored():
    def through_a_reference(p, b):
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] = b["x"].mean()
        return ref[...]

    called = lambda p, b: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(b["x"].shape, b["x"].dtype), b["x"]).mean()
    for loss in (through_a_reference, called):
        assert isinstance(verdict_of(loss, make_params(), make_batch()).outputs[0], Mixed)

    def printing(p, b):
        jax.debug.print("largest {}", b["x"].max())
        return jnp.mean(logits_of(p, b))

    assert is_mean(verdict_of(printing, make_params(), make_batch()).outputs[0])


def test_a_claim_must_fit_the_shapes():
    fixed, growing = Shapes((4, 3), (4, 3), 4, 2), Shapes((4, 3), (8, 3), 4, 2)
    assert fits(INDEPENDENT, fixed)
    assert fits(PerExample(0), growing)
    assert not fits(PerExample(0), fixed)
    assert not fits(PerExample(1), growing)
    assert not fits(INDEPENDENT, growing)
    assert not fits(Sum(Fraction(1)), growing)
    assert not fits(PerExample(0), Shapes((5,), (10,), 4, 2))  # not whole examples


def test_every_rule_is_for_a_primitive_that_exists():
    """A renamed primitive would only make losses mixed, silently. The second names are other versions'."""
    jax.make_jaxpr(lambda: jax.random.gamma(jax.random.key(0), 1.0))()  # its primitive is made on first use
    names = {thing.name for thing in gc.get_objects() if isinstance(thing, jax.extend.core.Primitive)}
    others = {
        "add_any", "checkpoint", "closed_call", "copy_p", "core_call", "custom_vjp_call_jaxpr", "pjit", "remat", "scatter_add",
        "scatter_sub", "scatter-mul", "scatter-min", "scatter-max", "scatter_mul", "scatter_min", "scatter_max", "compute_on",
        "xla_metadata_call",
    }  # fmt: skip
    unknown = (RULES.keys() | STEPS.keys()) - names - others
    assert not unknown


OPERATIONS: dict[str, Callable] = {
    "sin": jnp.sin,
    "shift": lambda h: h + 1,
    "by size": lambda h: h / h.shape[0],
    "mean 0": lambda h: h.mean(0),
    "mean -1": lambda h: h.mean(-1),
    "sum 0": lambda h: h.sum(0),
    "max 0": lambda h: h.max(0),
    "softmax": lambda h: jax.nn.softmax(h, -1),
    "swap": lambda h: h.swapaxes(0, -1),
    "flat": lambda h: h.reshape(-1),
    "merge": lambda h: h.reshape(-1, h.shape[-1]),
    "split": lambda h: h.reshape(-1, 4),
    "grow": lambda h: h[:, None] * jnp.ones(2)[:, None],
    "gram": lambda h: h @ h.T,
    "inner": lambda h: h.T @ h,
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "drop": lambda h: h[..., 1:],
    "own index": lambda h: h[jnp.arange(h.shape[0]), jnp.argmax(h, 1)],
    "zeros": jnp.zeros_like,
    "beside zeros": lambda h: jnp.concatenate([h, jnp.zeros_like(h)], -1),
    "scan": lambda h: lax.scan(lambda c, row: (c + row, jnp.sin(row)), jnp.zeros(h.shape[1:]), h)[1],
    "carry": lambda h: lax.scan(lambda c, row: (c + row.sum(), None), 0.0, h)[0],
    "where": lambda h: jnp.where(h > 0, h, 0.0),
    "place": lambda h: h * jnp.arange(h.shape[-1]),
}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=5), st.sampled_from(["x", "z"]))
def test_chains_of_operations_keep_their_word(names, start):
    """Any claim about any chain holds on numbers: the whole is what the claim makes of its two halves."""

    def chain(h):
        for name in names:
            h = OPERATIONS[name](h)
        return [h]

    whole = np.asarray(make_batch()[start][:4])
    try:
        state = analyze(chain, [jax.ShapeDtypeStruct((2, *whole.shape[1:]), whole.dtype)], [0]).outputs[0]
    except (TypeError, ValueError, IndexError):  # no such chain for these shapes
        return
    if isinstance(state, Mixed):
        return
    [got], parts = chain(whole), [np.asarray(chain(half)[0]) for half in (whole[:2], whole[2:])]
    if isinstance(state, PerExample):
        wanted = np.concatenate(parts, state.dim)
    else:
        wanted = mean_of(parts) * (float(state.ratio) if isinstance(state, Sum) else 1)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)
