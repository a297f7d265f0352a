"""Where the data was: `get_state()` of an iterator (grain's, or any object's) as JSON, one position per process."""

import base64
import json
import warnings
from typing import Any

import jax
import numpy as np

from jzero._errors import explain
from jzero.checkpoint.naming import WHO

BYTES = "__bytes__"  # grain's older iterators give their position as bytes


def encode(data: Any) -> Any:
    """The position of `data` as JSON values; a plain value stands for itself."""
    position = data.get_state() if hasattr(data, "get_state") else data
    try:
        return json.loads(json.dumps(_to_json(position)))
    except TypeError as error:
        found = [f"data={type(data).__name__}: {error}"]
        fix = "Pass an object with get_state() and set_state(position), or a position of dicts, lists, numbers and strings."
        raise TypeError(explain(f"{WHO}: save", "the data position cannot be written as JSON", found=found, fix=fix)) from None


def decode(position: Any) -> Any:
    """What `encode` was given."""
    if isinstance(position, dict):
        if set(position) == {BYTES}:
            return base64.b64decode(position[BYTES])
        return {key: decode(value) for key, value in position.items()}
    return [decode(value) for value in position] if isinstance(position, list) else position


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) or (hasattr(value, "item") and np.ndim(value) == 0) else value


def gather(position: Any) -> list[Any]:
    """Every process's position, in process order."""
    if jax.process_count() == 1:
        return [position]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(text.size))))
    padded = np.pad(text, (0, longest - text.size), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]


def own(positions: list[Any]) -> Any:
    """This process's position; of another number of processes the one that all shared, or all, with a warning."""
    if len(positions) == jax.process_count():
        return decode(positions[jax.process_index()])
    if all(position == positions[0] for position in positions):
        return decode(positions[0])
    problem = f"{len(positions)} processes wrote their data positions, {jax.process_count()} read them"
    fix = "restore returns the list of them: decide how your data goes on from there."
    warnings.warn(explain(f"{WHO}: restore", problem, fix=fix), stacklevel=3)
    return decode(positions)


def set_position(data: Any, position: Any) -> Any:
    """`data` moved to `position`; without one, the position itself."""
    if data is None:
        return position
    if not hasattr(data, "set_state"):
        fix = "Leave data= out and use the position that restore returns."
        raise TypeError(
            explain(f"{WHO}: restore", "data= takes an object with set_state", found=[f"got {type(data).__name__}"], fix=fix)
        )
    data.set_state(position)
    return data
