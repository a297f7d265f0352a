"""The ZeRO stages as data: where the state rests, when a parameter is gathered and when a gradient is reduced.

Rajbhandari, Rasley, Ruwase, He: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020.
"""

from typing import Literal, NamedTuple

from jzero._errors import explain


class Stage(NamedTuple):
    """One row of the table. `opt_state` and the master copy of `params` rest sharded from stage 1 on."""

    number: int
    shard_opt_state: bool
    shard_params: bool  # what jzero's own step does at rest: from stage 1 on the fp32 master is optimizer state
    shard_params_opaque: bool  # what a step that jzero did not write can do: its params are also its working copy
    gather: Literal["never", "step", "use"]  # when a sharded parameter becomes whole
    reduce: Literal["step", "use"]  # when a gradient is reduced


STAGES = {
    0: Stage(0, shard_opt_state=False, shard_params=False, shard_params_opaque=False, gather="never", reduce="step"),
    1: Stage(1, shard_opt_state=True, shard_params=True, shard_params_opaque=False, gather="step", reduce="step"),
    2: Stage(2, shard_opt_state=True, shard_params=True, shard_params_opaque=False, gather="step", reduce="use"),
    3: Stage(3, shard_opt_state=True, shard_params=True, shard_params_opaque=True, gather="use", reduce="use"),
}


def get(stage: int) -> Stage:
    """The row of the table, or a `ValueError` for a number that is no ZeRO stage."""
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in STAGES:
        raise ValueError(
            explain(
                "jzero.shard",
                f"stage must be one of {', '.join(map(str, STAGES))}",
                found=[f"stage={stage!r}"],
                context="0 replicates; 1 shards optimizer state; 2 also gradients; 3 also parameters.",
                fix="Write stage=3 to shard everything.",
            )
        )
    return STAGES[stage]
