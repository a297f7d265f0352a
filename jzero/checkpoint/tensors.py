"""Weights as a safetensors file, leaf by leaf: one leaf is in memory at a time, never the whole model."""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jzero._errors import explain, suggest
from jzero.checkpoint import checksums, folder
from jzero.checkpoint.naming import WHO, Name, nest, unnest

# huggingface/safetensors: eight bytes with the header's length, the header as JSON, the tensors in C order
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def export(path: Any, file: Any, *, only: str | None = None) -> list[str]:
    """Write the parameters of a checkpoint into one safetensors file; the names written.

    Host memory: the largest leaf. The file is written under another name first and appears when it is whole.

    Args:
      path: a checkpoint, or a manager's folder, whose newest is taken.
      file: the file to write, such as `"model.safetensors"`. Names are joined by dots: `layers.0.attn.w1`.
      only: the subtree to write, such as `"params/decoder"`. Default: `params` where there is one, everything otherwise.
        The subtree's own name is left out of the names.

    Raises:
      ValueError: no such subtree; a dtype that the format does not have; damaged files.
    """
    found = folder.open_one(folder.locate(path))
    checksums.check(found.arrays)
    leaves = _chosen(folder.present(found.arrays), only)
    header, offset = {}, 0
    for name, (_, leaf) in leaves.items():
        size = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        header[name] = {"dtype": _dtype(name, leaf), "shape": list(leaf.shape), "data_offsets": [offset, offset + size]}
        offset += size
    target = folder.absolute(file)
    partial = target.parent / f"{target.name}.partial"
    text = json.dumps({"__metadata__": {"format": "np"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for stored, leaf in leaves.values():
            out.write(read_leaf(found.arrays, stored, leaf).tobytes())
    partial.replace(target)
    return list(leaves)


def _chosen(there: dict[Name, Any], only: str | None) -> dict[str, tuple[Name, Any]]:
    prefix = tuple(only.split("/")) if only else ("params",) if any(name[0] == "params" for name in there) else ()
    inside = {name: leaf for name, leaf in there.items() if name[: len(prefix)] == prefix}
    if not inside:
        known = sorted({"/".join(name[: len(prefix)]) for name in there})
        raise ValueError(explain(f"{WHO}: export", f"no leaves under {only!r}", fix=suggest(only, known)))
    return {".".join(name[len(prefix) :] or name[-1:]): (name, leaf) for name, leaf in sorted(inside.items())}


def _dtype(name: str, leaf: Any) -> str:
    kind = np.dtype(leaf.dtype).name
    if kind not in DTYPES:
        fix = f"Leave it out with only=..., or convert it: the format has {', '.join(DTYPES)}."
        raise ValueError(
            explain(f"{WHO}: export", "a dtype that safetensors does not have", found=[f"{name}   {kind}"], fix=fix)
        )
    return DTYPES[kind]


def read_leaf(arrays: epath.Path, name: Name, leaf: Any) -> np.ndarray:
    """One leaf, whole, on the host."""
    item = nest({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)})
    how = nest({name: ocp.RestoreArgs(restore_type=np.ndarray)})
    asked = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return np.ascontiguousarray(unnest(checkpointer.restore(arrays, args=asked))[name])
