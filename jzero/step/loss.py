"""Calling the user's loss: what it may take, what it may give back, and one canonical form of both."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jzero._errors import explain
from jzero._tree import short


@jax.tree_util.register_pytree_node_class
class Weighted:
    """A loss as `sum / weight`, so that it is exact however the batch is split."""

    def __init__(self, sum: Any, weight: Any):
        self.sum, self.weight = sum, weight

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.sum, self.weight), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> "Weighted":
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Summed:
    """An aux value that is summed over microbatches and shards, where a plain scalar is averaged."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Summed":
        return cls(*children)


def weighted(sum: jax.Array, weight: jax.Array) -> Weighted:
    """A loss `sum / weight` whose parts are sums over examples: exact under unequal masks, accumulation and sharding.

    Args:
      sum: scalar, the sum of the loss over valid elements.
      weight: scalar, how many elements (or how much weight) that was. A step of total weight zero is skipped.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss_fn(params, x, mask):
      ...     return weighted(jnp.sum(mask * (x @ params) ** 2), jnp.sum(mask))
    """
    return Weighted(sum, weight)


def summed(value: Any) -> Summed:
    """Marks an aux value as a sum: added up over microbatches and shards instead of averaged. Any shape."""
    return Summed(value)


class Outcome(NamedTuple):
    """What one call of the loss gave: `weight` is None for a plain scalar loss."""

    sum: jax.Array  # float32[]
    weight: jax.Array | None  # float32[]
    aux: Any  # leaves: arrays, or `Summed`
    model_state: Any


class LossCall:
    """The user's loss behind one signature: `call(params, batch, rng, model_state) -> Outcome`."""

    def __init__(self, loss_fn: Callable[..., Any], *, has_aux: bool):
        self.loss_fn, self.has_aux = loss_fn, has_aux
        names = _parameter_names(loss_fn)
        self.takes_rng, self.takes_model_state = "rng" in names, "model_state" in names

    def __call__(self, params: Any, batch: tuple[Any, ...], rng: Any, model_state: Any) -> Outcome:
        extra = {"rng": rng} if self.takes_rng else {}
        extra |= {"model_state": model_state} if self.takes_model_state else {}
        out = self.loss_fn(params, *batch, **extra)
        loss, aux = self._split_aux(out)
        if self.takes_model_state:
            aux, model_state = self._split_model_state(aux)
        total, weight = (loss.sum, loss.weight) if isinstance(loss, Weighted) else (loss, None)
        total, weight = _scalar(total, "loss"), None if weight is None else _scalar(weight, "weight")
        return Outcome(total, weight, aux, model_state)

    def _split_aux(self, out: Any) -> tuple[Any, Any]:
        if not (self.has_aux or self.takes_model_state):
            if isinstance(out, tuple):
                fix = "Return the loss alone, or pass has_aux=True to make_train_step."
                raise TypeError(
                    explain("jzero.make_train_step", "the loss returned a tuple", found=[f"{len(out)} values"], fix=fix)
                )
            return out, {}
        if not isinstance(out, tuple) or len(out) != 2:
            reason = "has_aux=True" if self.has_aux else "a loss that takes model_state"
            fix = 'Return (loss, aux), with the new state in aux["model_state"] if the loss takes model_state.'
            raise TypeError(
                explain("jzero.make_train_step", f"{reason} asks for (loss, aux)", found=[f"got {type(out).__name__}"], fix=fix)
            )
        return out

    def _split_model_state(self, aux: Any) -> tuple[Any, Any]:
        if not isinstance(aux, dict) or "model_state" not in aux:
            fix = 'Return (loss, {"model_state": new_state, ...}).'
            raise TypeError(explain("jzero.make_train_step", "the loss takes model_state but gave none back", fix=fix))
        return {name: value for name, value in aux.items() if name != "model_state"}, aux["model_state"]


def _parameter_names(loss_fn: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(loss_fn).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _scalar(value: Any, what: str) -> jax.Array:
    """A real scalar in float32. A loss must be floating point: of an integer every gradient is zero."""
    who, kinds = "jzero.make_train_step", jnp.floating if what == "loss" else jnp.number
    if not isinstance(value, int | float) and not hasattr(value, "dtype"):
        fix = "Return a scalar, or jzero.weighted(sum, weight)."
        raise TypeError(explain(who, f"the {what} must be a scalar array", found=[f"got {type(value).__name__}"], fix=fix))
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, kinds):
        fix = "Reduce it, for example with jnp.mean, or return jzero.weighted(sum, weight)."
        raise ValueError(explain(who, f"the {what} must be a floating-point scalar", found=[short(value)], fix=fix))
    return value.astype(jnp.float32)
