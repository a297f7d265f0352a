"""Where examples meet: every verdict is held against numbers.

A loss that is said to be a mean (or a sum) must be the mean (sum) of its shards' losses, and so must its gradient. A loss in the
table of mixed ones must be said to be mixed, and the numbers must really differ.
"""

import functools
import gc
from collections.abc import Callable

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from jax import lax

from jzero.reduction import (
    INDEPENDENT,
    Mixed,
    PerExample,
    Sum,
    Verdict,
    analyze,
    explain_mixed,
    is_independent,
    is_mean,
    is_per_example,
    is_sum,
)
from jzero.reduction.control import STEPS
from jzero.reduction.walk import RULES

B, T, V, D = 6, 4, 5, 3  # 2 and 3 divide B; no other size is a multiple of it


def make_params() -> dict:
    rng = np.random.default_rng(0)
    shapes = {
        "w": (D, V),
        "embed": (V, D),
        "square": (D, D),
        "layers": (2, D, D),
        "kernel": (2, D, D),
        "b": (V,),
        "gate": (),
    }
    return {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}


def make_batch() -> dict:
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(B, D))),
        "z": jnp.asarray(rng.normal(size=(B, T, D))),
        "y": jnp.asarray(rng.integers(0, V, B), jnp.int32),
        "t": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "mask": jnp.asarray(rng.integers(0, 2, (B, T)), bool),
        "length": jnp.asarray(rng.integers(1, T + 1, B), jnp.int32),
    }


def verdict_of(loss: Callable, params, batch, *, rng=None, factor: int = 2, size: int | None = None) -> Verdict:
    """`analyze` for a loss of trees, of which only shapes are used. `size`: another batch size."""
    extra = () if rng is None else (rng,)
    tree, treedef = jax.tree.flatten((params, *extra, batch))
    is_batch = [True] * len(jax.tree.leaves(batch))
    is_batch = [False] * (len(tree) - len(is_batch)) + is_batch
    args = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in tree]
    if size is not None:
        args = [jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) if b else a for a, b in zip(args, is_batch, strict=True)]
    flat = lambda *leaves: jax.tree.leaves(loss(*jax.tree.unflatten(treedef, leaves)))
    return analyze(flat, args, [0 if b else None for b in is_batch], factor=factor)


ce = optax.softmax_cross_entropy_with_integer_labels


def logits_of(p, b):
    return b["x"] @ p["w"] + p["b"]


def token_logits(p, b):
    return jnp.tanh(p["embed"][b["t"]] @ p["square"]) @ p["embed"].T


def by_indexing(p, b):
    log_probs = jax.nn.log_softmax(logits_of(p, b))
    return -log_probs[jnp.arange(log_probs.shape[0]), b["y"]].mean()


def by_indexing_tokens(p, b):
    log_probs = jax.nn.log_softmax(token_logits(p, b))
    rows = jnp.arange(log_probs.shape[0])[:, None]
    return -log_probs[rows, jnp.arange(T)[None], b["t"]].mean()


def by_indexing_merged_tokens(p, b):
    log_probs = jax.nn.log_softmax(token_logits(p, b)).reshape(-1, V)
    return -log_probs[jnp.arange(log_probs.shape[0]), b["t"].reshape(-1)].mean()


def label_smoothed(p, b):
    return optax.softmax_cross_entropy(logits_of(p, b), optax.smooth_labels(jax.nn.one_hot(b["y"], V), 0.1)).mean()


def with_z_loss(p, b):
    logits = token_logits(p, b)
    return ce(logits, b["t"]).mean() + 1e-2 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def mean_over_own_length(p, b):
    inside = jnp.arange(T)[None] < b["length"][:, None]
    return jnp.mean(jnp.sum(ce(token_logits(p, b), b["t"]) * inside, axis=1) / b["length"])


def scanned_layers(p, b):
    def layer(h, w):
        return h + jax.nn.gelu(h @ w), jnp.mean(h**2)

    h, norms = lax.scan(jax.checkpoint(layer), b["z"], p["layers"])
    return jnp.mean(h @ p["w"]) + norms.sum()


def over_chunks_of_time(p, b):
    def chunk(total, step):
        hidden, labels = step
        return total + ce(hidden @ p["w"], labels).sum(), None

    total, _ = lax.scan(chunk, 0.0, (b["z"].swapaxes(0, 1), b["t"].T))
    return total / b["t"].size


def recurrent(p, b):
    def cell(h, x):
        h = jnp.tanh(h @ p["square"] + x)
        return h, h @ p["w"]

    _, logits = lax.scan(cell, jnp.zeros((b["z"].shape[0], D)), b["z"].swapaxes(0, 1))
    return ce(logits.reshape(-1, V), b["t"].T.reshape(-1)).mean()  # time-major: the batch is the minor factor


def attention(p, b):
    heads = (b["z"] @ p["square"])[:, :, None]
    out = jax.nn.dot_product_attention(heads, heads, heads, is_causal=True)
    return ce(out[:, :, 0] @ p["w"], b["t"]).mean()


def convolution(p, b):
    h = lax.conv_general_dilated(b["z"], p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"))
    return nn.max_pool(jax.nn.relu(h), (2,), strides=(2,)).mean()


def gradient_penalty(p, b):
    gradient = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(b["x"])
    return jnp.mean((jnp.linalg.norm(gradient, axis=-1) - 1) ** 2)


def vmapped_example(p, b):
    return jax.vmap(lambda x, y: ce(jnp.tanh(x @ p["w"]), y))(b["x"], b["y"]).mean()


def branches(p, b):
    either = lax.cond(p["gate"] > 0, lambda x: x @ p["w"], lambda x: jnp.zeros((x.shape[0], V)), b["x"])
    return jnp.mean(either + lax.switch(1, [jnp.sin, jnp.cos, jnp.tanh], logits_of(p, b)))


def fixed_while(p, b):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1] + 1)), (0, b["x"]))[1].mean() * p["gate"]


def running_sums(p, b):
    h = jnp.cumsum(token_logits(p, b), axis=1)
    return lax.associative_scan(jnp.maximum, h, axis=1).mean() + jnp.sort(h, axis=-1)[..., -1].mean() + lax.top_k(h, 2)[0].mean()


def written_one_hot(p, b):
    rows = jnp.arange(b["y"].shape[0])
    return jnp.mean(jnp.zeros((b["y"].shape[0], V)).at[rows, b["y"]].set(1.0) * logits_of(p, b))


def cut_and_joined(p, b):
    h = jnp.pad(b["z"], ((0, 0), (1, 0), (0, 0)))[:, :-1]
    h = jnp.concatenate([h, b["z"]], axis=-1).reshape(-1, T, 2, D)
    return jnp.mean(jnp.stack(jnp.split(h, 2, axis=2), axis=1).sum(axis=(1, 3)) @ p["square"])


def filled_in_steps(p, b):
    out = jnp.zeros((b["z"].shape[0], T, V))
    out = lax.fori_loop(0, T, lambda i, o: lax.dynamic_update_slice_in_dim(o, (b["z"] @ p["w"])[:, :1] * i, i, 1), out)
    return jnp.mean(out.at[:, 0].set(1.0) ** 2)


@jax.custom_vjp
def own_matmul(x, w):
    return x @ w


own_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))

MEANS = {
    "mean": lambda p, b: jnp.mean(jnp.tanh(logits_of(p, b))),
    "sum over batch size": lambda p, b: jnp.sum(logits_of(p, b) ** 2 / b["x"].shape[0]),
    "dot with weights": lambda p, b: jnp.dot(ce(logits_of(p, b), b["y"]), jnp.full(b["y"].shape, 1 / b["y"].shape[0])),
    "mean of means": lambda p, b: ce(token_logits(p, b), b["t"]).mean(0).mean(),
    "optax labels": lambda p, b: ce(logits_of(p, b), b["y"]).mean(),
    "merged tokens": lambda p, b: ce(token_logits(p, b).reshape(-1, V), b["t"].reshape(-1)).mean(),
    "indexing": by_indexing,
    "indexing tokens": by_indexing_tokens,
    "indexing merged tokens": by_indexing_merged_tokens,
    "numpy arange": lambda p, b: logits_of(p, b)[np.arange(b["y"].shape[0]), b["y"]].mean(),
    "take_along_axis": lambda p, b: -jnp.take_along_axis(jax.nn.log_softmax(logits_of(p, b)), b["y"][:, None], axis=1).mean(),
    "one_hot": lambda p, b: jnp.sum(jax.nn.one_hot(b["y"], V) * logits_of(p, b)) / b["y"].shape[0],
    "written one hot": written_one_hot,
    "label smoothing": label_smoothed,
    "z-loss": with_z_loss,
    "mean over own length": mean_over_own_length,
    "masked, over all tokens": lambda p, b: jnp.mean(jnp.where(b["mask"], ce(token_logits(p, b), b["t"]), 0.0)),
    "largest feature": lambda p, b: jnp.max(logits_of(p, b), axis=-1).mean(),
    "vmap": vmapped_example,
    "lax.map": lambda p, b: lax.map(lambda x: jnp.tanh(x @ p["w"]).sum(), b["x"]).mean(),
    "scan over layers, remat": scanned_layers,
    "chunks of time": over_chunks_of_time,
    "recurrent, time-major": recurrent,
    "attention": attention,
    "convolution": convolution,
    "penalty": lambda p, b: ce(logits_of(p, b), b["y"]).mean() + 0.1 * optax.global_norm(p) ** 2,
    "gradient penalty": gradient_penalty,
    "cond and switch": branches,
    "while": fixed_while,
    "running sums": running_sums,
    "cut and joined": cut_and_joined,
    "filled in steps": filled_in_steps,
    "custom matmul": lambda p, b: own_matmul(b["x"], p["w"]).mean(),
    "straight through": lambda p, b: (b["x"] @ straight_through(p["w"])).mean(),
    "stop_gradient": lambda p, b: jnp.mean(logits_of(p, b) * lax.stop_gradient(jax.nn.softmax(logits_of(p, b)))),
    "covariance": lambda p, b: jnp.sum(jnp.einsum("bi,bj->ij", b["x"], b["x"]) * p["square"]) / b["x"].shape[0],
    "no batch": lambda p, _: jnp.sum(p["w"] ** 2),
}

SUMS = {
    "sum": lambda p, b: jnp.sum(jnp.tanh(logits_of(p, b))),
    "masked sum": lambda p, b: jnp.sum(ce(token_logits(p, b), b["t"]) * b["mask"]),
    "mean times size": lambda p, b: ce(logits_of(p, b), b["y"]).mean() * b["y"].shape[0],
    "over tokens only": lambda p, b: jnp.sum(ce(token_logits(p, b), b["t"])) / T,
    "scattered": lambda p, b: jnp.zeros(V).at[b["y"]].add(logits_of(p, b)[:, 0]) @ p["b"],
    "segments": lambda p, b: jnp.sum(jax.ops.segment_sum(jnp.tanh(logits_of(p, b)), b["y"], V) * p["b"]),
    "relu of rows": lambda p, b: jax.nn.relu(logits_of(p, b)).sum(),
}


def in_batch_negatives(p, b):
    z = b["x"] @ p["square"]
    return ce(z @ z.T, jnp.arange(z.shape[0])).mean()  # LINE: in-batch negatives


def batch_norm(p, b):
    h = logits_of(p, b)
    centered = h - h.mean(axis=0)  # LINE: batch statistics
    return jnp.mean(jnp.tanh(centered / jnp.sqrt(h.var(axis=0) + 1e-5)) ** 2)


def centered_loss(p, b):
    each = ce(logits_of(p, b), b["y"])
    return jnp.mean((each - each.mean()) ** 2)  # LINE: loss minus its mean


def load_balance(p, b):
    share = jax.nn.softmax(logits_of(p, b)).mean(axis=0)
    return jnp.sum(share**2)  # LINE: load balance


def stop_when_all_small(p, b):
    return jnp.mean(lax.while_loop(lambda h: jnp.any(h > 0.3), lambda h: h * 0.5, lax.stop_gradient(logits_of(p, b))))


def carried_over_examples(p, b):
    _, out = lax.scan(lambda h, x: (jnp.tanh(h + x), h), jnp.zeros(D), b["x"])
    return jnp.mean(out @ p["w"])


def normalised_backwards(g):
    return g / jnp.linalg.norm(g)


@jax.custom_vjp
def normalise_gradient(h):
    return h


normalise_gradient.defvjp(lambda h: (h, None), lambda _, g: (normalised_backwards(g),))


@jax.custom_vjp
def clip_gradient(h):
    return h


clip_gradient.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -1e-2, 1e-2),))


@jax.custom_jvp
def leaking_tangent(h):
    return h


leaking_tangent.defjvp(lambda primals, tangents: (primals[0], tangents[0] - tangents[0].mean(axis=0) / 2))

MIXED = {
    "masked mean": lambda p, b: jnp.sum(ce(token_logits(p, b), b["t"]) * b["mask"]) / b["mask"].sum(),
    "guarded masked mean": lambda p, b: (
        jnp.sum(ce(token_logits(p, b), b["t"]) * b["mask"]) / jnp.maximum(b["mask"].sum(), 1)
    ),
    "mean where": lambda p, b: jnp.mean(ce(token_logits(p, b), b["t"]), where=b["mask"]),
    "in-batch negatives": in_batch_negatives,
    "batch statistics": batch_norm,
    "loss minus its mean": centered_loss,
    "load balance": load_balance,
    "variance": lambda p, b: jnp.var(logits_of(p, b)),
    "largest of all": lambda p, b: jnp.max(logits_of(p, b)),
    "softmax over the batch": lambda p, b: jnp.sum(jax.nn.softmax(logits_of(p, b), axis=0)[:, 0] * b["x"][:, 0]),
    "sorted over the batch": lambda p, b: jnp.mean(jnp.sort(logits_of(p, b), axis=0) * logits_of(p, b)),
    "cumulative over the batch": lambda p, b: jnp.mean(jnp.cumsum(logits_of(p, b), axis=0)),
    "neighbour": lambda p, b: jnp.mean(logits_of(p, b) * jnp.roll(logits_of(p, b), 1, axis=0)),
    "first example": lambda p, b: jnp.mean(logits_of(p, b) * logits_of(p, b)[0]),
    "half the batch": lambda p, b: jnp.mean(logits_of(p, b)[: b["x"].shape[0] // 2]),
    "place in the batch": lambda p, b: jnp.mean(logits_of(p, b) * jnp.arange(b["x"].shape[0])[:, None]),
    "place beyond the first": lambda p, b: jnp.sum(jnp.where(jnp.arange(b["x"].shape[0]) > 0, logits_of(p, b)[:, 0], 0.0)),
    "other rows": lambda p, b: jnp.mean(logits_of(p, b)[b["y"] % 2]),
    "table by place": lambda p, b: jnp.mean(jnp.sin(jnp.arange(16.0))[jnp.arange(b["x"].shape[0])] * logits_of(p, b)[:, 0]),
    "exp of mean": lambda p, b: jnp.exp(ce(logits_of(p, b), b["y"]).mean()),
    "root mean square": lambda p, b: jnp.sqrt(jnp.mean(logits_of(p, b) ** 2)),
    "clipped mean": lambda p, b: jnp.minimum(jnp.mean(logits_of(p, b)), 0.0),
    "penalty beside a sum": lambda p, b: ce(logits_of(p, b), b["y"]).sum() + 0.1 * jnp.sum(p["w"] ** 2),
    "rounded mean": lambda p, b: (100 * jnp.mean(logits_of(p, b) * 1.2345)).astype(jnp.int32) * p["gate"],
    "integer mean": lambda p, b: (jnp.sum(b["length"]) // b["length"].shape[0]) * p["gate"],
    "square of the size": lambda p, b: jnp.sum(logits_of(p, b)) / b["x"].shape[0] ** 2,
    "size inside": lambda p, b: jnp.mean(jnp.tanh(logits_of(p, b) / b["x"].shape[0])),
    "groups across examples": lambda p, b: jnp.mean(jnp.max(b["x"].reshape(2, -1, D), axis=1) @ p["w"]),
    "time-major groups": lambda p, b: jnp.mean(jnp.max(b["z"].swapaxes(0, 1).reshape(2, -1, D), axis=1) @ p["w"]),
    "loop until all are small": stop_when_all_small,
    "branch by the batch": lambda p, b: lax.cond(b["x"].mean() > 0, lambda: p["gate"], lambda: 0.0),
    "carried over examples": carried_over_examples,
    "normalised gradient": lambda p, b: normalise_gradient(logits_of(p, b)).mean(),
    "clipped gradient": lambda p, b: clip_gradient(5 * logits_of(p, b)).mean(),
    "clipped gradient of weights": lambda p, b: (b["x"] @ clip_gradient(p["w"])).mean(),
    "leaking tangent": lambda p, b: jnp.mean(leaking_tangent(logits_of(p, b)) ** 2),
    "python branch": lambda p, b: logits_of(p, b).mean() * (2.0 if b["x"].shape[0] > 4 else 1.0) ** (b["x"].shape[0] > 4),
}


@functools.cache
def measured(name: str) -> tuple:
    """Loss and gradient of the whole batch, and of its 2 and 3 shards, in float64 and one compilation."""
    with jax.enable_x64(True):
        loss = {**MEANS, **SUMS, **MIXED}[name]
        one = jax.value_and_grad(lambda p, b: jnp.asarray(loss(p, b), jnp.float64))
        cut = lambda b, n: jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), b)
        each = lambda p, b: [jax.tree.map(lambda *s: jnp.stack(s), *[one(p, _row(cut(b, n), i)) for i in range(n)]) for n in (2, 3)]
        return jax.device_get(jax.jit(lambda p, b: (one(p, b), each(p, b)))(make_params(), make_batch()))


def _row(tree, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def worst(name: str, combine: Callable) -> float:
    """The largest relative difference, over values and gradients, between the whole and its combined shards."""
    whole, shards = measured(name)
    differences = []
    for parts in shards:
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(jax.tree.map(combine, parts)), strict=True):
            differences.append(np.abs(a - b).max() / max(np.abs(a).max(), 1e-3))
    return max(differences)


def mean_of(parts):
    return parts.mean(axis=0)


def sum_of(parts):
    return parts.sum(axis=0)


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_the_mean_of_its_shards(name):
    [state] = verdict_of(MEANS[name], make_params(), make_batch()).outputs
    assert is_mean(state), explain_mixed(state)
    assert worst(name, mean_of) < 1e-9


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_the_sum_of_its_shards(name):
    [state] = verdict_of(SUMS[name], make_params(), make_batch()).outputs
    assert is_sum(state), explain_mixed(state)
    assert worst(name, sum_of) < 1e-9


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_loss_is_refused_and_really_differs(name):
    [state] = verdict_of(MIXED[name], make_params(), make_batch()).outputs
    assert not is_mean(state) and not is_sum(state), state
    assert min(worst(name, mean_of), worst(name, sum_of)) > 1e-4


@pytest.mark.parametrize("factor", [3, 8])
def test_the_number_of_shards_can_be_given(factor):
    for table, holds in ((MEANS, is_mean), (SUMS, lambda state: is_sum(state, factor=factor))):
        for name in list(table)[:4]:
            [state] = verdict_of(table[name], make_params(), make_batch(), factor=factor).outputs
            assert holds(state), f"{name}: {explain_mixed(state)}"
