"""What lies beside the arrays as JSON: the state's structure, and where and with what it was written."""

import hashlib
import importlib.metadata
import json
from typing import Any

import jax
from etils import epath

from jzero._errors import explain
from jzero.checkpoint import checksums, naming, position, structure
from jzero.checkpoint.naming import WHO
from jzero.engine.layout import Layout
from jzero.engine.statics import split_statics
from jzero.shard import STEPS, ShardedStep
from jzero.step import TrainStep

FORMAT = 1  # raised when an older jzero could misread what a newer one writes
LIBRARIES = ("jzero", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")


def write(state: Any, *, step: ShardedStep | None, number: int | None, data: Any) -> dict[str, Any]:
    """The notes of one state. `step`: the sharded step that it belongs to, whose stage and precision are noted; if not given,
    the one that has made such a state, if all that have are of one stage and precision.
    """
    arrays, statics = split_statics(state)
    leaves = jax.tree.leaves(arrays)
    step = step or _maker(arrays)
    body = {
        "format": FORMAT,
        "step": number,
        "versions": {name: _version(name) for name in LIBRARIES},
        "mesh": _mesh(leaves),
        "num_processes": jax.process_count(),
        "stage": None if step is None else step.stage,
        "precision": _precision(step),
        "structure": None if statics else structure.describe(jax.tree.structure(arrays)),
        "leaves": [_leaf(name, leaf) for name, leaf in zip(naming.names(arrays), leaves, strict=True)],
        "data": None if data is None else position.gather(position.encode(data)),
    }
    return {**body, "digest": _digest(body)}


def read(file: epath.Path) -> dict[str, Any]:
    """The notes, checked against their digest and this version's format."""
    try:
        found = json.loads(file.read_text())
        digest, number = found.pop("digest"), found["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise checksums.CorruptCheckpoint(
            checksums.damaged(file.parent.parent, "the notes cannot be read", [f"{file}: {error}"])
        ) from error
    if isinstance(number, int) and number > FORMAT:
        problem = f"this checkpoint has format {number}, this jzero reads up to {FORMAT}"
        context = f"written by jzero {found.get('versions', {}).get('jzero')}; this is {_version('jzero')}"
        fix = "Install that jzero or a newer one. Plain Orbax reads the arrays in state/ in any case."
        raise ValueError(explain(f"{WHO}: restore", problem, found=[str(file)], context=context, fix=fix))
    if digest != _digest(found):
        raise checksums.CorruptCheckpoint(
            checksums.damaged(file.parent.parent, "1 file is damaged", [f"{file} is not what was written"])
        )
    return found


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mesh(leaves: list[Any]) -> dict[str, int] | None:
    meshes = [leaf.sharding.mesh for leaf in leaves if hasattr(getattr(leaf, "sharding", None), "mesh")]
    return dict(meshes[0].shape) if meshes else None


def _maker(arrays: Any) -> ShardedStep | None:
    makers = [step for step in list(STEPS) if step.known is not None and _fits(step.known[0], arrays)]
    alike = {(step.stage, str(_precision(step))) for step in makers}
    return makers[0] if len(alike) == 1 else None


def _fits(layout: Layout, arrays: Any) -> bool:
    leaves = jax.tree.leaves(arrays)
    if layout.treedef != jax.tree.structure(arrays):
        return False
    rows = zip(leaves, layout.avals, layout.shardings, strict=True)
    return all(
        isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (aval.shape, aval.dtype) and leaf.sharding == where
        for leaf, aval, where in rows
    )


def _precision(step: ShardedStep | None) -> dict[str, str] | None:
    if step is None or not isinstance(step.fn, TrainStep):
        return None
    return {name: jax.numpy.dtype(dtype).name for name, dtype in step.fn.policy._asdict().items()}


def _leaf(name: naming.Name, leaf: Any) -> dict[str, Any]:
    stored = naming.stored_shape(leaf)
    spec = getattr(getattr(leaf, "sharding", None), "spec", None)
    return {
        "name": list(name),
        "shape": list(stored.shape),
        "dtype": stored.dtype.name,
        "key": naming.key_impl(leaf),
        "spec": None if spec is None else str(spec),
    }
