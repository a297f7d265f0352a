"""Tables that several tests walk: one line here is one more row in every law."""

import jax
import optax
from optax import contrib

from jzero import optim

LEARNING_RATE = 1e-3
DECAYING = optax.warmup_cosine_decay_schedule(1e-5, LEARNING_RATE, warmup_steps=2, decay_steps=20)


def by_ndim(matrix, vector):
    """A pytree like the parameters with one value for matrices and another for the rest."""
    return lambda params: jax.tree.map(lambda leaf: matrix if leaf.ndim >= 2 else vector, params)


def adamw():
    return optax.adamw(LEARNING_RATE)


# name -> a fresh optimizer whose hyperparameters are safe on any small model
OPTIMIZERS = {
    "adamw": adamw,
    "momentum": lambda: optax.sgd(LEARNING_RATE, momentum=0.9),
    "sgd": lambda: optax.sgd(LEARNING_RATE),
    "lion": lambda: optax.lion(LEARNING_RATE / 10),
    "lamb": lambda: optax.lamb(LEARNING_RATE),
    "adafactor": lambda: optax.adafactor(LEARNING_RATE, min_dim_size_to_factor=8),
    "muon": lambda: contrib.muon(LEARNING_RATE),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), adamw()),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": adamw(), "vector": optax.sgd(LEARNING_RATE, momentum=0.9)}, by_ndim("matrix", "vector")
    ),
    "masked": lambda: optax.masked(adamw(), by_ndim(True, False)),
    "multi_steps": lambda: optax.MultiSteps(adamw(), every_k_schedule=2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=LEARNING_RATE),
    "schedule": lambda: optax.adamw(DECAYING),
    "sgd_schedule": lambda: optax.sgd(DECAYING),
    "apply_if_finite": lambda: optax.apply_if_finite(adamw(), max_consecutive_errors=3),
    "ema": lambda: optax.chain(adamw(), optax.ema(0.9)),
    "moments_8bit": lambda: optim.moments_8bit(adamw(), min_elements=16),
    "moments_bf16": lambda: optim.moments_bf16(adamw()),
    "fused_adamw": lambda: optim.fused_adamw(LEARNING_RATE),
    "fused_lion": lambda: optim.fused_lion(LEARNING_RATE / 10),
    "fused_8bit": lambda: optim.fused_adamw(LEARNING_RATE, moments="8bit", min_elements=16),
    "fused_bf16": lambda: optim.fused_lion(LEARNING_RATE / 10, moments="bfloat16"),
}

# name -> how many leaves of its state mirror one matrix, and one vector
NUM_MIRRORS = {
    "adamw": (2, 2),
    "momentum": (1, 1),
    "sgd": (0, 0),
    "lion": (1, 1),
    "lamb": (2, 2),
    "adafactor": (0, 1),
    "muon": (1, 2),
    "clipped": (2, 2),
    "multi_transform": (2, 1),
    "masked": (2, 0),
    "multi_steps": (3, 3),
    "inject_hyperparams": (2, 2),
    "schedule": (2, 2),
    "sgd_schedule": (0, 0),
    "apply_if_finite": (2, 2),
    "ema": (3, 3),
    "moments_8bit": (2, 2),
    "moments_bf16": (2, 2),
    "fused_adamw": (2, 2),
    "fused_lion": (1, 1),
    "fused_8bit": (2, 2),
    "fused_bf16": (1, 1),
}
