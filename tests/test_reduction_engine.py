"""Never a silently different loss: each either goes manual and is equal, or stays global, is equal, and is named in the report.

The analysis by itself is tested in test_reduction.py; here whole sharded steps are held against the same steps on one device.
"""

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine_losses import (
    GLOBAL,
    MANUAL,
    B,
    D,
    T,
    V,
    ce,
    contrastive,
    label_smoothed,
    load_balancing_over_the_batch,
    logits,
    make_batch,
    mapped,
    masked_mean,
    params,
    plain_mean,
    summed_up,
    weighted,
    weighted_by_the_parameters,
    weighted_unalike,
    with_penalty,
)

import jzero
from jzero.engine import compiler

TX = optax.sgd(0.1, momentum=0.9)  # its trace after one step is the gradient
QUICK = {"xla_backend_optimization_level": "0"}


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    needed = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**needed(mesh), **QUICK})


class Ran(NamedTuple):
    """One step: what the report calls the engine and finds in the loss, and what came out."""

    engine: str
    findings: tuple[str, ...]
    loss: float
    grads: dict[str, np.ndarray]
    state: Any
    metrics: Any


def sharded(own: jzero.TrainStep, batch: Any, *, stage: int = 2, mesh: Any = None, **init: Any) -> Ran:
    step = jzero.shard(own, stage=stage, mesh=mesh, min_shard_elements=16)
    state = step.place(own.init(params(), **init))
    report = step.report(state, batch)
    state, metrics = jax.device_get(step(state, batch))
    return Ran(report.engine, report.findings, metrics["loss"], state.opt_state[0].trace, state, metrics)


def alone(own: jzero.TrainStep, batch: Any, **init: Any) -> Ran:
    state, metrics = jax.device_get(jax.jit(own, compiler_options=QUICK)(own.init(params(), **init), batch))
    return Ran("", (), metrics["loss"], state.opt_state[0].trace, state, metrics)


def assert_equal(actual: Ran, expected: Ran) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert difference(actual.grads, expected.grads) <= 1e-5


def difference(actual: Any, expected: Any) -> float:
    """The largest relative L2 difference of a leaf."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(a - e) / (np.linalg.norm(e) or 1)) for a, e in pairs)


def line_of(loss: Callable[..., Any]) -> str:
    """`file:line` of the marked line of a loss, or of its first."""
    source, start = inspect.getsourcelines(loss)
    marked = [start + offset for offset, text in enumerate(source) if text.rstrip().endswith("# LINE")]
    return f"{Path(inspect.getsourcefile(loss)).name}:{(marked or [start])[0]}"


LATER = (summed_up, mapped, label_smoothed, with_penalty, load_balancing_over_the_batch)  # they have neighbours
QUICK_ACCUMULATED = (plain_mean, weighted, weighted_by_the_parameters)


def accumulated():
    """In microbatches too; in `make test` a few."""
    kept = [loss for loss in MANUAL if loss not in LATER]
    return [pytest.param(loss, 2, marks=[pytest.mark.slow] * (loss not in QUICK_ACCUMULATED)) for loss in kept]


@pytest.mark.parametrize(
    ("loss", "accumulate"),
    [*itertools.product(MANUAL, [1]), *accumulated()],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_manual_where_examples_meet_in_the_final_mean_alone(loss, accumulate):
    own = jzero.make_train_step(loss, TX, accumulate=accumulate)
    ran = sharded(own, make_batch(), stage=3 if accumulate == 1 else 2)
    assert ran.engine == "composed", ran.findings
    assert not any("examples meet" in line for line in ran.findings)
    assert_equal(ran, alone(own, make_batch()))


@pytest.mark.parametrize("loss", GLOBAL, ids=lambda loss: loss.__name__)
def test_global_and_named_where_examples_meet_before(loss):
    accumulate = 2 if loss in (masked_mean, contrastive) else 1
    own = jzero.make_train_step(loss, TX, accumulate=accumulate)
    ran = sharded(own, make_batch(), stage=2 + GLOBAL.index(loss) % 2)
    assert ran.engine == "composed (global)"
    [finding] = [line for line in ran.findings if "examples meet before the final mean" in line]
    assert "stays global, reduced in every microbatch" in finding
    if loss is weighted_unalike:  # its parts are sums and means: no line is to blame
        assert finding.startswith("weighted loss")
    elif "# LINE" in inspect.getsource(loss):
        assert line_of(loss) in finding
    else:
        assert loss.__name__ in finding
    assert_equal(ran, alone(own, make_batch()))


def test_a_sum_says_so():
    ran = sharded(jzero.make_train_step(summed_up, TX), make_batch())
    assert any("the loss is a sum over examples" in line for line in ran.findings)


def test_a_hybrid_mesh():
    own = jzero.make_train_step(weighted, TX, accumulate=2)
    ran = sharded(own, make_batch(), mesh=jzero.make_mesh(replica=2))
    assert ran.engine == "composed"
    assert_equal(ran, alone(own, make_batch()))


def test_shards_that_are_masked_altogether():
    """Weights are added up before anything is divided: shards and microbatches of weight zero count nothing."""
    batch = make_batch()
    batch["mask"][3:] = 0
    own = jzero.make_train_step(weighted, TX, accumulate=2)
    ran = sharded(own, batch)
    assert ran.engine == "composed"
    assert not ran.metrics["skipped"]
    assert_equal(ran, alone(own, batch))


def test_a_padded_batch_is_the_batch():
    batch = make_batch()
    short = jax.tree.map(lambda leaf: leaf[:11], batch)
    padded, real = jzero.pad_batch(short, B)
    padded["mask"] = padded["mask"] * real[:, None]
    own = jzero.make_train_step(weighted, TX, accumulate=2)
    assert_equal(sharded(own, padded), alone(jzero.make_train_step(weighted, TX), short))


def test_everything_masked_is_skipped_on_every_device():
    batch = make_batch()
    batch["mask"][:] = 0
    ran = sharded(jzero.make_train_step(weighted, TX), batch)
    assert ran.metrics["skipped"]
    assert difference(ran.state.params, params()) == 0


# reduction= ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [plain_mean, weighted], ids=lambda loss: loss.__name__)
def test_global_is_insisted_on(loss):
    own = jzero.make_train_step(loss, TX, reduction="global")
    ran = sharded(own, make_batch(), stage=3)
    assert ran.engine == "composed (global)"
    assert not any("examples meet" in line for line in ran.findings)
    assert_equal(ran, alone(own, make_batch()))


@pytest.mark.parametrize("loss", [masked_mean, contrastive], ids=lambda loss: loss.__name__)
def test_local_is_the_mean_of_the_shards(loss):
    """As DDP and DeepSpeed have it: another loss than on one device, and the report says so."""
    batch = make_batch()
    ran = sharded(jzero.make_train_step(loss, TX, reduction="local"), batch, stage=3)
    assert ran.engine == "composed"
    [finding] = [line for line in ran.findings if "examples meet before the final mean" in line]
    assert "is the mean of the shards' own, as reduction='local' asks" in finding
    assert line_of(loss) in finding
    shards = [jax.tree.map(lambda leaf, i=i: leaf[2 * i : 2 * i + 2], batch) for i in range(8)]
    own = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    losses, grads = zip(*(own(params(), shard) for shard in shards), strict=True)
    mean = jax.device_get(jax.tree.map(lambda *leaves: sum(leaves) / 8, *grads))
    assert ran.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert difference(ran.grads, mean) <= 1e-5
    whole = alone(jzero.make_train_step(loss, TX), batch)
    assert difference(ran.grads, whole.grads) > 0.1


def test_local_is_nothing_else_for_a_plain_mean():
    own = jzero.make_train_step(plain_mean, TX, reduction="local")
    ran = sharded(own, make_batch())
    assert not any("examples meet" in line for line in ran.findings)
    assert_equal(ran, alone(own, make_batch()))


# what a loss gives beside its value ----------------------------------------------------------------------------------


def with_model_state(p, b, model_state):
    """Batch statistics in training, and their running mean as model state."""
    h = logits(p, b)
    mean = h.mean(axis=(0, 1))
    new = {"mean": 0.9 * model_state["mean"] + 0.1 * mean, "count": model_state["count"] + 1}
    return ce(h - mean, b["labels"]).mean(), {"model_state": new}


def counting(p, b, model_state):
    return plain_mean(p, b), {"model_state": {"mean": model_state["mean"], "count": model_state["count"] + 1}}


def first_state():
    return {"mean": jnp.zeros(V), "count": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_statistics_in_the_model_state(accumulate):
    own = jzero.make_train_step(with_model_state, TX, accumulate=accumulate)
    ran = sharded(own, make_batch(), model_state=first_state())
    expected = alone(own, make_batch(), model_state=first_state())
    assert ran.engine == "composed (global)"
    assert any(line.startswith("model_state stays global") for line in ran.findings)
    assert_equal(ran, expected)
    assert difference(ran.state.model_state, expected.state.model_state) <= 1e-5


def test_a_model_state_without_the_batch_is_no_obstacle():
    own = jzero.make_train_step(counting, TX, accumulate=2)
    ran = sharded(own, make_batch(), model_state=first_state())
    assert ran.engine == "composed", ran.findings
    assert ran.state.model_state["count"] == 2
    assert_equal(ran, alone(own, make_batch(), model_state=first_state()))


def test_local_model_states_are_averaged():
    own = jzero.make_train_step(with_model_state, TX, reduction="local")
    ran = sharded(own, make_batch(), model_state=first_state())
    means = [
        logits(params(), jax.tree.map(lambda leaf, i=i: leaf[2 * i : 2 * i + 2], make_batch())).mean((0, 1)) for i in range(8)
    ]
    np.testing.assert_allclose(ran.state.model_state["mean"], 0.1 * np.mean(means, axis=0), rtol=1e-4, atol=1e-6)
    assert ran.state.model_state["count"] == 1


def with_aux(p, b):
    each = ce(logits(p, b), b["labels"])
    right = jnp.sum(jnp.argmax(logits(p, b), -1) == b["labels"])
    aux = {
        "mean": each.mean(),
        "right": jzero.summed(right),
        "each": each.mean(axis=1),
        "by token": jzero.summed(each.sum(axis=0)),
    }
    return each.mean(), aux


@pytest.mark.parametrize("reduction", ["auto", "global"])
def test_aux(reduction):
    own = jzero.make_train_step(with_aux, TX, has_aux=True, accumulate=2, reduction=reduction)
    ran, expected = sharded(own, make_batch()), alone(own, make_batch())
    assert ran.engine == ("composed" if reduction == "auto" else "composed (global)"), ran.findings
    assert_equal(ran, expected)
    assert ran.metrics["aux"]["right"] == expected.metrics["aux"]["right"]
    assert ran.metrics["aux"]["each"].shape == (B,)
    assert difference(ran.metrics["aux"], expected.metrics["aux"]) <= 1e-5


def test_an_aux_in_which_examples_meet_is_an_obstacle():
    def centred(p, b):
        each = ce(logits(p, b), b["labels"]).mean(axis=1)
        return each.mean(), {"centred": each - each.mean()}  # LINE

    own = jzero.make_train_step(centred, TX, has_aux=True)
    ran, expected = sharded(own, make_batch()), alone(own, make_batch())
    assert ran.engine == "composed (global)"
    assert any(line.startswith("aux stays global") and line_of(centred) in line for line in ran.findings), ran.findings
    assert_equal(ran, expected)
    assert difference(ran.metrics["aux"], expected.metrics["aux"]) <= 1e-5


def test_random_draws_by_example():
    """Under "auto" each shard draws with a key of its own; "global" draws as one device does."""

    def dropout(p, b, rng):
        keep = jax.random.bernoulli(rng, 0.5, (b["tokens"].shape[0], T, D))
        return ce((p["embed"][b["tokens"]] * keep) @ p["head"], b["labels"]).mean()

    same = jzero.make_train_step(dropout, TX, reduction="global", accumulate=2)
    assert_equal(sharded(same, make_batch()), alone(same, make_batch()))
    other = sharded(jzero.make_train_step(dropout, TX, accumulate=2), make_batch())
    assert other.engine == "composed", other.findings
    assert other.loss != pytest.approx(alone(same, make_batch()).loss, rel=1e-5)
