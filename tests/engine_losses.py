"""Losses of one small model by what the sharded step makes of them: `MANUAL` and `GLOBAL`. "# LINE" is the line to blame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jzero

B, T, D, V = 16, 4, 24, 48
ce = optax.softmax_cross_entropy_with_integer_labels


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "layers": (2, D, D), "head": (D, V)}
    return {name: jnp.asarray(rng.normal(size=shape) / 5, jnp.float32) for name, shape in shapes.items()}


def make_batch() -> dict[str, np.ndarray]:
    """Masks so unequal that a mean of the shards' own means is far off: the last rows have a token each."""
    rng = np.random.default_rng(1)
    length = np.where(np.arange(B) < B // 2, T, 1)
    return {
        "tokens": rng.integers(0, V, (B, T), dtype=np.int32),
        "labels": rng.integers(0, V, (B, T), dtype=np.int32),
        "mask": (np.arange(T) < length[:, None]).astype(np.float32),
    }


def logits(p: Any, b: Any) -> jax.Array:
    return jnp.tanh(p["embed"][b["tokens"]] @ p["layers"][0]) @ p["head"]


def plain_mean(p, b):
    return ce(logits(p, b), b["labels"]).mean()


def masked_mean(p, b):
    return jnp.sum(ce(logits(p, b), b["labels"]) * b["mask"]) / jnp.sum(b["mask"])  # LINE


def weighted(p, b):
    return jzero.weighted(jnp.sum(ce(logits(p, b), b["labels"]) * b["mask"]), jnp.sum(b["mask"]))


def weighted_by_the_parameters(p, b):
    certain = lax.stop_gradient(jax.nn.softmax(logits(p, b)).max(-1))
    return jzero.weighted(jnp.sum(ce(logits(p, b), b["labels"]) * certain), jnp.sum(certain))


def weighted_means(p, b):
    """Both parts are means: their quotient is the same, and so is that of their sums over shards."""
    return jzero.weighted(jnp.mean(ce(logits(p, b), b["labels"]) * b["mask"]), jnp.mean(b["mask"]))


def weighted_unalike(p, b):
    return jzero.weighted(jnp.sum(ce(logits(p, b), b["labels"])), jnp.mean(b["mask"]))


def label_smoothed(p, b):
    return optax.softmax_cross_entropy(logits(p, b), optax.smooth_labels(jax.nn.one_hot(b["labels"], V), 0.1)).mean()


def z_loss(p, b):
    h = logits(p, b)
    return ce(h, b["labels"]).mean() + 1e-2 * jnp.mean(jax.nn.logsumexp(h, axis=-1) ** 2)


def contrastive(p, b):
    z = logits(p, b).mean(axis=1)
    return ce(z @ z.T, jnp.arange(z.shape[0])).mean()  # LINE


def batch_statistics(p, b):
    h = logits(p, b)
    h = (h - h.mean(axis=(0, 1))) / jnp.sqrt(h.var(axis=(0, 1)) + 1e-3)
    return ce(h, b["labels"]).mean()


def largest_of_each_example(p, b):
    return jnp.max(ce(logits(p, b), b["labels"]), axis=1).mean()


def largest_of_all(p, b):
    return jnp.max(ce(logits(p, b), b["labels"]))  # LINE


def vmapped(p, b):
    return jax.vmap(lambda example: plain_mean(p, jax.tree.map(lambda leaf: leaf[None], example)))(b).mean()


def mapped(p, b):
    return lax.map(lambda example: plain_mean(p, example), b).mean()


def scanned(p, b):
    h, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), p["embed"][b["tokens"]], p["layers"])
    return ce(h @ p["head"], b["labels"]).mean()


def rematerialised(p, b):
    layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
    h, _ = lax.scan(layer, p["embed"][b["tokens"]], p["layers"])
    return jax.checkpoint(lambda h: ce(h @ p["head"], b["labels"]).mean())(h)


def summed_up(p, b):
    return ce(logits(p, b), b["labels"]).sum()


def root_of_a_mean(p, b):
    return jnp.sqrt(plain_mean(p, b))  # LINE


def load_balancing(p, b):
    share = jax.nn.softmax(logits(p, b)).mean(axis=(0, 1))
    return plain_mean(p, b) + jnp.sum(share**2)  # LINE


def load_balancing_over_the_batch(p, b):
    share = jzero.over_batch_mean(jax.nn.softmax(logits(p, b)).mean(axis=(0, 1)))
    return plain_mean(p, b) + jnp.sum(share**2)


def weighted_with_statistics(p, b):
    """What is the same in every shard counts as often as the shard weighs."""
    share = jzero.over_batch_mean(jax.nn.softmax(logits(p, b)).mean(axis=(0, 1)))
    weight = jnp.sum(b["mask"])
    return jzero.weighted(jnp.sum(ce(logits(p, b), b["labels"]) * b["mask"]) + weight * jnp.sum(share**2), weight)


def with_penalty(p, b):
    return plain_mean(p, b) + 1e-2 * optax.tree.norm(p, squared=True)


MANUAL = (
    plain_mean, weighted, weighted_by_the_parameters, weighted_means, label_smoothed, z_loss, largest_of_each_example, vmapped,
    mapped, scanned, rematerialised, summed_up, with_penalty, load_balancing_over_the_batch, weighted_with_statistics,
)  # fmt: skip
GLOBAL = (masked_mean, weighted_unalike, contrastive, batch_statistics, largest_of_all, root_of_a_mean, load_balancing)
