"""Which devices take part in a collective together, in every form that HLO writes it, and which mesh axes that is.

Forms (openxla/xla, `hlo/ir/replica_group.cc`, `mesh_and_axis.cc`, `tile_assignment.h`): lists `{{0,1},{2,3}}`; an iota
`[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`; mesh axes `mesh['a'=2,'b'=4] {'b'}` with parts of axes `'b':(2)2` and a device order.
"""

import math
import re
from typing import Any

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(([\d,\s]*)\))?\s*\{(.*)\}")
_AXIS = re.compile(r"'?([^',=:]+)'?=(\d+)")
_AXIS_USE = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)")
_LIST = re.compile(r"\{([\d,\s]*)\}")


def decode(text: str, num_devices: int) -> Groups:
    """The replica groups that `text` (the value of `replica_groups=`) stands for. No groups means all devices.

    Example:
      >>> decode("[2,4]<=[4,2]T(1,0)", 8)
      ((0, 2, 4, 6), (1, 3, 5, 7))
    """
    if found := _MESH.fullmatch(text):
        return _from_mesh(*found.groups())
    if found := _IOTA.fullmatch(text):
        shape, dims, order = (_numbers(part or "") for part in found.groups())
        return _tuples(np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(shape))
    listed = tuple(_numbers(group) for group in _LIST.findall(text[1:-1]))
    return tuple(group for group in listed if group) or (tuple(range(num_devices)),)


def decode_pairs(text: str) -> Groups:
    """`source_target_pairs` as groups of two."""
    return tuple(_numbers(pair) for pair in _LIST.findall(text[1:-1]))


def axis_of(groups: Groups, mesh: Any) -> str:
    """The mesh axes along which the members of a group differ: `data`, or `replica+data`; `none` for groups of one.

    Args:
      groups: partition ids, which are positions in `mesh.devices.flat`.
      mesh: a `jax.sharding.Mesh`, or anything with `axis_names` and `devices.shape`.

    Returns:
      Axis names joined by `+`, in the mesh's order. A group that spans only part of an axis still names the axis.
    """
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
        varies |= (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, differs in zip(mesh.axis_names, varies, strict=True) if differs) or "none"


def group_size(groups: Groups) -> int:
    return max(map(len, groups))


def _from_mesh(axes: str, device_ids: str | None, used: str) -> Groups:
    """Split each axis into the parts that are used and the rest, and put the used ones last, in the order of use."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    uses = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_USE.findall(used)]
    dims, position = [], {}
    for name, size in sizes.items():
        done = 1
        for use in sorted(use for use in uses if use[0] == name):
            _, before, part = use
            position[use] = len(dims) + 1
            dims += [before // done, part]
            done = before * part
        dims.append(size // done)
    ids = np.array(_numbers(device_ids)) if device_ids else np.arange(math.prod(sizes.values()))
    last = [position[use] for use in uses]
    first = [dim for dim in range(len(dims)) if dim not in last]
    together = math.prod(dims[dim] for dim in last)
    return _tuples(ids.reshape(dims).transpose(first + last).reshape(-1, together))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(map(int, group)) for group in groups)
