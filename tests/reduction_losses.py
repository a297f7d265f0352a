"""Losses as users write them, by what a mean or a sum over shards makes of them: `MEANS`, `SUMS` and `MIXED`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jzero.reduction import Verdict, analyze

B, T, V, D = 12, 4, 5, 3  # 2 and 3 divide B; no other size is a multiple of it


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
    return (
        lax.associative_scan(jnp.maximum, h, axis=1).mean() + jnp.sort(h, axis=-1)[..., -1].mean() + lax.top_k(h, 2)[0].mean()
    )


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
    "penalty": lambda p, b: ce(logits_of(p, b), b["y"]).mean() + 0.1 * optax.tree.norm(p) ** 2,
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
    "divided by ones": lambda p, b: jnp.sum(logits_of(p, b)) / jnp.ones((b["x"].shape[0], V)).sum(),
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


def tokens_in_two_orders(p, b):
    features = b["z"] @ p["square"]
    return features.reshape(-1, D), features.swapaxes(0, 1).reshape(-1, D)


def window_from_own_place(p, b):
    logits = logits_of(p, b)
    pairs = jax.vmap(lambda i: lax.dynamic_slice_in_dim(logits, i, 2))(jnp.arange(logits.shape[0]))
    return jnp.mean(pairs[:, 0] * pairs[:, 1])


def delayed_carry(p, b):
    """The sum over examples reaches the nonlinear function an iteration later."""

    def step(carry, h):
        late, sum_now = carry
        return (sum_now, sum_now + jnp.mean(h @ p["w"])), late**2

    _, squares = lax.scan(step, (jnp.zeros(()), jnp.zeros(())), b["z"].swapaxes(0, 1))
    return squares.sum()


def windows_over_examples(p, b):
    return jnp.mean(lax.reduce_window(logits_of(p, b), 0.0, lax.add, (2, 1), (1, 1), "SAME") ** 2)


def convolved_over_examples(p, b):
    return lax.conv_general_dilated(b["x"][None], p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")).mean()


def shifted_by_padding(p, b):
    return jnp.mean(logits_of(p, b) * lax.pad(logits_of(p, b), jnp.zeros((), p["w"].dtype), [(1, -1, 0), (0, 0, 0)]))


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
    "guarded masked mean": lambda p, b: jnp.sum(ce(token_logits(p, b), b["t"]) * b["mask"]) / jnp.maximum(b["mask"].sum(), 1),
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
    "other rows, clipped": lambda p, b: jnp.mean(jnp.take(logits_of(p, b), b["y"], axis=0, mode="clip")),
    "first merged tokens": lambda p, b: token_logits(p, b).reshape(-1, V)[jnp.arange(b["y"].shape[0]), b["y"]].mean(),
    "window from own place": window_from_own_place,
    "windows over examples": windows_over_examples,
    "convolved over examples": convolved_over_examples,
    "shifted by padding": shifted_by_padding,
    "two orders of tokens": lambda p, b: jnp.mean(jnp.multiply(*tokens_in_two_orders(p, b))),
    "two orders contracted": lambda p, b: jnp.einsum("ni,ni->", *tokens_in_two_orders(p, b)),
    "table by place": lambda p, b: jnp.mean(jnp.sin(jnp.arange(16.0))[jnp.arange(b["x"].shape[0])] * logits_of(p, b)[:, 0]),
    "exp of mean": lambda p, b: jnp.exp(ce(logits_of(p, b), b["y"]).mean()),
    "root mean square": lambda p, b: jnp.sqrt(jnp.mean(logits_of(p, b) ** 2)),
    "clipped mean": lambda p, b: jnp.minimum(jnp.mean(logits_of(p, b)), 0.0),
    "penalty beside a sum": lambda p, b: ce(logits_of(p, b), b["y"]).sum() + 0.1 * jnp.sum(p["w"] ** 2),
    "rounded mean": lambda p, b: (100 * jnp.mean(logits_of(p, b) * 1.2345)).astype(jnp.int32) * p["gate"],
    "integer mean": lambda p, b: (jnp.sum(7 * b["length"]) // b["length"].shape[0]) * p["gate"],
    "square of the size": lambda p, b: jnp.sum(logits_of(p, b)) / b["x"].shape[0] ** 2,
    "product of means": lambda p, b: jnp.mean(logits_of(p, b)) * jnp.mean(jnp.sin(b["x"])),
    "integer division": lambda p, b: lax.div(jnp.sum(7 * b["length"]), jnp.sum(jnp.ones_like(b["length"]))) * p["gate"],
    "size as a power": lambda p, b: jnp.mean((0.9 + 0.1 * jnp.tanh(logits_of(p, b))) ** b["x"].shape[0]),
    "size undone": lambda p, b: jnp.mean(jnp.tanh(logits_of(p, b) / b["x"].shape[0]) * b["x"].shape[0]),
    "size in a map": lambda p, b: lax.map(lambda x: jnp.tanh((x @ p["w"]).sum() / b["x"].shape[0]), b["x"]).mean(),
    "delayed carry": delayed_carry,
    "size inside": lambda p, b: jnp.mean(jnp.tanh(logits_of(p, b) / b["x"].shape[0])),
    "groups across examples": lambda p, b: jnp.mean(jnp.max(b["x"].reshape(2, -1, D), axis=1) @ p["w"]),
    "time-major groups": lambda p, b: jnp.mean(jnp.max(b["z"].swapaxes(0, 1).reshape(2, -1, D), axis=1) @ p["w"]),
    "loop until all are small": stop_when_all_small,
    "branch by the batch": lambda p, b: lax.cond(b["length"].sum() > 5 * T, lambda: p["gate"], lambda: 0.0),
    "carried over examples": carried_over_examples,
    "normalised gradient": lambda p, b: normalise_gradient(logits_of(p, b)).mean(),
    "clipped gradient": lambda p, b: clip_gradient(5 * logits_of(p, b)).mean(),
    "clipped gradient of weights": lambda p, b: (b["x"] @ clip_gradient(p["w"])).mean(),
    "leaking tangent": lambda p, b: jnp.mean(leaking_tangent(logits_of(p, b)) ** 2),
    "python number": lambda p, b: logits_of(p, b).mean() * b["x"].shape[0].bit_length(),
}


ONLY_GRADIENTS_MIX = {"normalised gradient", "clipped gradient", "clipped gradient of weights", "leaking tangent"}
