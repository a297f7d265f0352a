"""Groups of devices as HLO writes them, against numpy, and the mesh axis that they are."""

import math
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jzero import hlo

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.data(), shapes)
def test_iota_groups_against_numpy(data, dims):
    order = data.draw(st.permutations(range(len(dims))))
    split = data.draw(st.integers(0, len(dims)))
    moved = [dims[place] for place in order]
    groups, members = math.prod(moved[:split]), math.prod(moved[split:])
    turned = f"T({','.join(map(str, order))})" if order != sorted(order) else ""
    text = f"[{groups},{members}]<=[{','.join(map(str, dims))}]{turned}"
    expected = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups, members)
    assert hlo.decode(text, math.prod(dims)) == tuple(map(tuple, expected.tolist()))


@given(st.data(), shapes)
def test_mesh_groups_against_numpy(data, dims):
    names = [f"axis_{place}" for place in range(len(dims))]
    used = data.draw(st.permutations(range(len(dims))).map(lambda order: order[: 1 + len(order) // 2]))
    ids = data.draw(st.permutations(range(math.prod(dims))))
    axes = ",".join(f"'{name}'={size}" for name, size in zip(names, dims, strict=True))
    text = f"mesh[{axes}], device_ids=({','.join(map(str, ids))}) {{{','.join(repr(names[place]) for place in used)}}}"
    rest = [place for place in range(len(dims)) if place not in used]
    expected = np.array(ids).reshape(dims).transpose([*rest, *used]).reshape(-1, math.prod(dims[place] for place in used))
    assert hlo.decode(text, math.prod(dims)) == tuple(map(tuple, expected.tolist()))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=8] {'a':(4)2,'a':(1)2}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("mesh['a'=2,'b'=4] {}", tuple((device,) for device in range(8))),
    ],
)
def test_groups_in_other_forms(text, groups):
    assert hlo.decode(text, 8) == groups


@given(st.data(), st.lists(st.integers(2, 4), min_size=1, max_size=4))
def test_axis_of_random_meshes(data, dims):
    names = tuple("abcd"[: len(dims)])
    mesh = SimpleNamespace(axis_names=names, devices=np.empty(dims))
    used = sorted(data.draw(st.sets(st.sampled_from(range(len(dims))))))
    rest = [place for place in range(len(dims)) if place not in used]
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(rest + used)
    groups = ids.reshape(-1, math.prod(dims[place] for place in used)).tolist()
    assert hlo.axis_of(tuple(map(tuple, groups)), mesh) == ("+".join(names[place] for place in used) or "none")


def test_axis_of_a_permute_and_a_part():
    mesh = SimpleNamespace(axis_names=("replica", "data"), devices=np.empty((2, 4)))
    assert hlo.axis_of(((0, 1), (1, 2), (4, 5)), mesh) == "data"
    assert hlo.axis_of(((0, 1), (2, 3)), mesh) == "data"
    assert hlo.axis_of(((0, 4),), mesh) == "replica"
