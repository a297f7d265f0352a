"""Names that settle a doubt. Used only where types and mirroring leave more than one answer."""

from collections.abc import Iterable, Sequence

from jzero.roles.entries import Parts

PARAMS = ("params", "parameters", "model", "weights", "w", "theta")  # best first
OPT_CONTAINERS = ("opt_state", "optimizer_state", "optim_state", "opt", "optim", "optimizer")
MOMENTS = ("m", "mu", "v", "nu", "momentum", "momentums", "velocity", "trace", "exp_avg", "exp_avg_sq", "adam_m", "adam_v")
COPIES = ("ema", "avg", "average", "target", "teacher", "shadow", "polyak", "swa", "best", "old", "slow")
NOT_PARAMS = ("batch_stats", "stats", "cache", "metrics", "loss_scale", "model_state")  # beside parameters, never trained


def is_copy(part: str) -> bool:
    """`ema`, `ema_params`, `params_ema`, `target_net`: a copy of the parameters that no optimizer updates."""
    return any(word in COPIES for word in part.lower().split("_"))


def is_opt(part: str) -> bool:
    return part.lower() in OPT_CONTAINERS + MOMENTS


def is_params(root: Parts) -> bool:
    """Whether the last part of a path is a name that parameters have."""
    return bool(root) and root[-1].lower() in PARAMS


def prefer(roots: Sequence[Parts]) -> list[Parts]:
    """The roots narrowed by name: copies last, then the best of `PARAMS`; several remain where names do not decide."""
    ranks = {root: _rank(root) for root in originals(roots)}
    best = min(ranks.values(), default=len(PARAMS))
    return [root for root, rank in ranks.items() if rank == best]


def originals(roots: Sequence[Parts]) -> list[Parts]:
    """The roots not named as copies, or all of them if they all are."""
    return [root for root in roots if not any(map(is_copy, root))] or list(roots)


def _rank(root: Iterable[str]) -> int:
    return min((PARAMS.index(part.lower()) for part in root if part.lower() in PARAMS), default=len(PARAMS))
