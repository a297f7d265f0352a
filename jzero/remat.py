"""Rematerialisation policies: what a backward pass finds saved and what it computes again.

Chen, Xu, Zhang, Guestrin: Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jax

from jzero._errors import explain, suggest

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,  # save everything
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # weights' matmuls, not attention scores
}

# What "dots" saves, saved in host memory instead of the device's.
OFFLOADING: dict[str, Callable[..., Any]] = {
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
}
BY_NAME = "offload:"  # "offload:hidden,attention": what jax.ad_checkpoint.checkpoint_name gave one of these names


class _Request:
    """What the step being traced asks of the layers in it, and whether one of them answered."""

    def __init__(self, policy: Callable[..., Any] | None):
        self.policy, self.answered = policy, False


_request: ContextVar[_Request | None] = ContextVar("jzero_remat_request", default=None)


def get(remat: Any) -> Any:
    """`None`, a policy name or a jax policy, checked; names become policies, `"none"` stays itself."""
    if remat is None or remat == "none" or (callable(remat) and not isinstance(remat, str)):
        return remat
    if is_offloading(remat) and remat not in OFFLOADING:
        return offloading_names(remat.removeprefix(BY_NAME))
    known = {**POLICIES, **OFFLOADING}
    if remat not in known:
        found, fix = [f"remat={remat!r}"], "Pass a name or one of jax.checkpoint_policies."
        raise ValueError(explain("jzero.shard", "unknown remat policy", found=found, context=suggest(remat, known), fix=fix))
    return known[remat]


def is_offloading(remat: Any) -> bool:
    """Whether a policy's name asks for saving to host memory."""
    return isinstance(remat, str) and (remat in OFFLOADING or remat.startswith(BY_NAME))


def offloading_names(names: str) -> Callable[..., Any]:
    """A policy that saves only what has one of these names (`jax.ad_checkpoint.checkpoint_name`), in host memory."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        fix = 'Write remat="offload:hidden" where the layer has checkpoint_name(x, "hidden").'
        raise ValueError(
            explain("jzero.shard", "remat= names nothing to offload", found=[f"remat={BY_NAME + names!r}"], fix=fix)
        )
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=chosen, offload_src="device", offload_dst="pinned_host"
    )


def wrap_layer(fn: Callable[..., Any], *, scanned: bool = True) -> Callable[..., Any]:
    """`fn`, one layer of a model, under the remat policy of the step that is being traced; `fn` itself if there is none.

    Layers that are the body of a scan or stand in a list call this; the policy then applies to each of them. In a list
    (`scanned=False`) a barrier keeps the compiler from merging the two forward passes; a scan needs none.
    """
    request = _request.get()
    if request is None:
        return fn
    request.answered = True
    return fn if request.policy is None else jax.checkpoint(fn, policy=request.policy, prevent_cse=not scanned)


@contextmanager
def requested(policy: Any) -> Iterator[_Request]:
    """While a loss is traced, `wrap_layer` uses `policy`. Trace-time only: nothing survives the context."""
    request = _Request(None if policy == "none" else policy)
    token = _request.set(request)
    try:
        yield request
    finally:
        _request.reset(token)


def apply(fn: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    """A loss under `policy`: on each of its layers if they call `wrap_layer`, else on the loss as a whole."""
    if policy is None:
        return fn

    @wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with requested(policy) as request:
            # As a function of its own: jax remembers one that it has traced before, and then no layer would ask for the policy.
            jax.eval_shape(lambda *args, **kwargs: fn(*args, **kwargs), *args, **kwargs)
        whole = not request.answered and request.policy is not None
        with requested(policy):
            return (jax.checkpoint(fn, policy=request.policy) if whole else fn)(*args, **kwargs)

    return traced
