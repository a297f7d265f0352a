"""The one part of a state that a change of precision changes beyond its dtype: the loss scale."""

from typing import Any

import jax

from jzero.checkpoint import folder
from jzero.shard import ShardedStep
from jzero.step import TrainState, TrainStep
from jzero.step.state import initial_loss_scale


def begin_anew(state: Any, step: ShardedStep, found: folder.Found) -> Any:
    """The first loss scale of the step's precision, where the checkpoint was written by one that scaled and this one does
    not, or the other way round: at the scale 1 that a bf16 run stores, fp16 gradients would vanish. Skipped steps still count.
    """
    written = found.notes.get("precision")
    if not isinstance(state, TrainState) or not isinstance(step.fn, TrainStep) or written is None:
        return state
    scales = step.fn.policy.scales_loss
    if scales == (written["compute"] == "float16"):
        return state
    fresh = initial_loss_scale(dynamic=scales)
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding, may_alias=False), fresh, state.loss_scale)
    return state._replace(loss_scale=placed._replace(num_skipped=state.loss_scale.num_skipped))
