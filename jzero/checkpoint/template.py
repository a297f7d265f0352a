"""What state a step expects: its structure, shapes and dtypes, known before a byte is read."""

from typing import Any

import jax
import jax.numpy as jnp

from jzero._errors import explain
from jzero.checkpoint import folder, naming, structure
from jzero.checkpoint.changes import NONE, Changes
from jzero.checkpoint.naming import WHO
from jzero.engine.layout import Layout
from jzero.engine.statics import Statics
from jzero.shard import ShardedStep
from jzero.step import TrainState, TrainStep


def of(step: ShardedStep, found: folder.Found, *, into: Any = None, changes: Changes = NONE) -> tuple[Layout, Statics]:
    """That of `into`, or the step's own, if it has seen a state; otherwise rebuilt from the checkpoint, and then known to the
    step. What is to be changed cannot be rebuilt.

    Raises:
      ValueError: neither is possible; the message has the line to write.
    """
    if not isinstance(step, ShardedStep):
        fix = "Pass the step that jzero.shard returned."
        raise TypeError(explain(f"{WHO}: restore", "onto which step?", found=[f"got {type(step).__name__}"], fix=fix))
    if into is not None:
        step.shardings(into)
    if step.known is None:
        step.shardings(_rebuilt(step, found) if changes == NONE else _or_explain(None, step, found))
    assert step.known is not None
    return step.known


def _rebuilt(step: ShardedStep, found: folder.Found) -> Any:
    state = _stored(found)
    if not isinstance(step.fn, TrainStep):
        return _or_explain(state, step, found)
    if state is None and not found.notes:  # plain Orbax: dicts all the way down
        state = naming.nest({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _present(found)})
    params, model_state, rng = (_field(state, name) for name in ("params", "model_state", "rng"))
    params = _or_explain(params, step, found)
    fresh = jax.eval_shape(lambda params, model_state: step.fn.init(params, model_state=model_state), params, model_state)
    is_key = rng is not None and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    return fresh._replace(rng=rng) if is_key else fresh


def _present(found: folder.Found) -> Any:
    return folder.present(found.arrays).items()


def _field(state: Any, name: str) -> Any:
    if isinstance(state, TrainState):
        return getattr(state, name)
    return state.get(name) if isinstance(state, dict) else None


def _stored(found: folder.Found) -> Any:
    """The abstract state that the notes describe, or None."""
    described = found.notes.get("structure")
    if described is None:
        return None
    leaves = [_abstract(leaf) for leaf in found.notes["leaves"]]
    try:
        return structure.rebuild(described, iter(leaves))
    except LookupError:
        return None


def _abstract(leaf: dict[str, Any]) -> jax.ShapeDtypeStruct:
    shape, dtype = tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])
    if leaf["key"] is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    words = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda words: jax.random.wrap_key_data(words, impl=leaf["key"]), words)


def _or_explain(state: Any, step: ShardedStep, found: folder.Found) -> Any:
    if state is not None:
        return state
    problem = "the structure of the state is not known"
    met = [f"{step!r} has seen no state yet, and the checkpoint does not describe its containers (it can for dicts, lists,"]
    met += ["tuples and named tuples whose modules are imported), or is to be changed (rename=, partial=, restack=)"]
    fix = "First write step.shardings(jax.eval_shape(make_state)), or state = step.init(make_state); either makes it known."
    raise ValueError(explain(f"{WHO}: restore", problem, found=met, context=f"checkpoint {found.root}", fix=fix))
