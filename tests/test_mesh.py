"""Meshes: sizes, order, axis types and every error."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jzero._types import MESH_AXES
from jzero.mesh import _ordered, _over_slices, axis_size, batch_axes, check_mesh, describe, make_mesh
from jzero.topology import topology

AUTO = AxisType.Auto


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, {"data": 8}),
        ({"data": 8}, {"data": 8}),
        ({"replica": 2}, {"replica": 2, "data": 4}),
        ({"tensor": 8}, {"data": 1, "tensor": 8}),
        ({"data": 2, "pipe": -1}, {"data": 2, "pipe": 4}),
        ({"expert": 2, "sequence": 2}, {"data": 2, "sequence": 2, "expert": 2}),
        ({"data": np.int64(8)}, {"data": 8}),
    ],
)
def test_sizes_and_order(sizes, shape):
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == shape
    assert list(mesh.axis_names) == [axis for axis in MESH_AXES if axis in shape]
    assert set(mesh.axis_types) == {AUTO}
    assert list(mesh.devices.flat) == jax.devices()
    check_mesh(mesh)


def test_given_devices_are_used_as_given():
    backwards = jax.devices()[:6][::-1]
    mesh = make_mesh(data=3, tensor=2, devices=backwards)
    assert list(mesh.devices.flat) == backwards
    assert dict(make_mesh(devices=np.array(jax.devices()).reshape(2, 4)).shape) == {"data": 8}
    one = make_mesh(devices=jax.devices()[:1])
    assert jax.device_put(np.ones(2), NamedSharding(one, PartitionSpec("data"))).sum() == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["multiply to 3", "8 devices", "data=8", "jax.devices()[:3]"]),
        ({"data": 4}, ["multiply to 4", "data=8"]),
        ({"data": 4, "tensor": 3}, ["multiply to 12", "data     4", "tensor   3", "divides 8"]),
        ({"tensor": 3}, ["multiply to 3", "tensor   3"]),
        ({"data": 16}, ["multiply to 16", "data=8"]),
        ({"data": -1, "pipe": -1}, ["only one axis", "data=-1", "pipe=-1"]),
        ({"data": 0}, ["positive int", "data=0"]),
        ({"tensor": -2, "data": 2.0}, ["positive int", "tensor=-2", "data=2.0"]),
        ({"data": True}, ["data=True"]),
        ({"devices": []}, ["0 devices"]),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(ValueError, match=r"^jzero\.make_mesh: ") as error:
        make_mesh(**sizes)
    for word in [*words, "make_mesh("]:
        assert word in str(error.value)


def mesh_of(*names, kind=AUTO):
    shape = (8,) + (1,) * (len(names) - 1)
    return Mesh(np.array(jax.devices()).reshape(shape), names, axis_types=(kind,) * len(names))


def test_check_mesh_names_what_is_wrong():
    with pytest.raises(ValueError, match="no 'data' axis") as error:
        check_mesh(mesh_of("dta"))
    assert "Did you mean 'data'?" in str(error.value)
    with pytest.raises(ValueError, match="unknown axis") as error:
        check_mesh(mesh_of("data", "tenser"))
    assert "'tenser': Did you mean 'tensor'?" in str(error.value)
    with pytest.raises(TypeError, match=r"jax\.sharding\.Mesh"):
        check_mesh("data=8")
    check_mesh(mesh_of("data", "model"))  # an axis of the user's own


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Manual])
def test_explicit_axes_show_the_way_out(kind):
    with pytest.raises(ValueError, match=f"'data' is {kind.name}") as error:
        check_mesh(mesh_of("data", kind=kind))
    text = str(error.value)
    assert "jzero.make_mesh(data=8)" in text
    assert "jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))" in text


def test_helpers():
    mesh = make_mesh(replica=2, tensor=2)
    assert batch_axes(mesh) == ("replica", "data")
    assert batch_axes(make_mesh()) == ("data",)
    assert axis_size(mesh, "data") == 2
    assert axis_size(mesh, ("replica", "data", "tensor", "pipe")) == 8
    assert axis_size(mesh, ()) == 1
    assert describe(mesh) == "{'replica': 2, 'data': 2, 'tensor': 2}"


def test_slices_span_the_outermost_axes():
    assert _over_slices((16,), 1) is None
    assert _over_slices((16,), 2) == (2,)
    assert _over_slices((2, 8), 4) == (2, 2)
    assert _over_slices((1, 2, 8), 2) == (1, 2, 1)


def test_devices_that_jax_cannot_order_come_in_plain_order():
    chip = {"platform": "tpu", "device_kind": "TPU v4", "coords": (0, 0, 0), "process_index": 0}
    devices = [SimpleNamespace(id=i, core_on_chip=i, **chip) for i in range(2)]
    with pytest.warns(UserWarning, match="plain order"):
        grid = _ordered(devices, (2,))
    assert list(grid) == devices


@pytest.mark.compile
def test_tpu_rings():
    """Along a ring of the 4x4 torus each neighbour is one hop away."""
    grid = _ordered(topology("v5e:4x4"), (16,))
    hops = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in zip(grid, np.roll(grid, -1), strict=True)]
    assert set(hops) == {1}


@pytest.mark.compile
def test_tpu_slices_are_outermost():
    grid = _ordered(topology("v5e:4x4*2"), (2, 16))
    assert [{device.slice_index for device in row} for row in grid] == [{0}, {1}]
    with pytest.raises(ValueError, match="multiply to 3"):
        make_mesh(data=3, devices=topology("v5e:4x4"))
    assert dict(make_mesh(tensor=4, devices=topology("v5e:4x4")).shape) == {"data": 4, "tensor": 4}
