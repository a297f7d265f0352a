"""The state of a train step that jzero wrote, and the dynamic loss scale in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

INITIAL_SCALE = 2.0**15
GROWTH_INTERVAL = 1000  # clean steps in a row, after which the scale doubles
FULL_CREDIT = 2  # overflows that are forgiven before the scale halves, as DeepSpeed's hysteresis
LARGEST_SCALE = 2.0**64  # far above any that a finite fp16 gradient allows; keeps zero gradients from reaching infinity


class LossScaleState(NamedTuple):
    """Dynamic loss scale and its counters; without fp16 the scale stays 1 and only skipped steps are counted."""

    scale: jax.Array  # float32[]
    clean_steps: jax.Array  # int32[], in a row
    credit: jax.Array  # int32[]
    num_skipped: jax.Array  # int32[], since the beginning


class TrainState(NamedTuple):
    """Everything that a step reads and writes. `step` counts optimizer updates, so a skipped step does not move it."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32[]
    rng: jax.Array  # a typed PRNG key
    loss_scale: LossScaleState
    model_state: Any


def initial_loss_scale(*, dynamic: bool) -> LossScaleState:
    zero = jnp.zeros((), jnp.int32)
    scale = jnp.asarray(INITIAL_SCALE if dynamic else 1.0, jnp.float32)
    return LossScaleState(scale, zero, jnp.full((), FULL_CREDIT, jnp.int32), jnp.zeros((), jnp.int32))


def next_loss_scale(state: LossScaleState, clean: jax.Array, *, dynamic: bool) -> LossScaleState:
    """After a step: an overflow takes a credit, at the last credit it halves the scale (floor 1); the 1,000th clean step in
    a row doubles the scale and refills the credit.
    """
    skipped = state._replace(num_skipped=state.num_skipped + jnp.where(clean, 0, 1).astype(jnp.int32))
    if not dynamic:
        return skipped
    run = jnp.where(clean, state.clean_steps + 1, 0)
    grows = run >= GROWTH_INTERVAL
    halves = ~clean & (state.credit <= 1)
    scale = jnp.where(grows, jnp.minimum(state.scale * 2, LARGEST_SCALE), state.scale)
    scale = jnp.where(halves, jnp.maximum(state.scale / 2, 1.0), scale)
    credit = jnp.where(grows, FULL_CREDIT, jnp.where(clean, state.credit, jnp.maximum(state.credit - 1, 1)))
    return skipped._replace(
        scale=scale, clean_steps=jnp.where(grows, 0, run).astype(jnp.int32), credit=credit.astype(jnp.int32)
    )
