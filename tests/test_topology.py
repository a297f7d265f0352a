"""Targets by name, and programs compiled for devices that are not there."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.compilers import compilers as compilers
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jzero import topology as topologies  # the function, once jzero/__init__ has run
from jzero.topology import Target, memory_bytes, parse, topology
from jzero.topology_specs import GPUS, TPUS, target_config

# target -> number of devices, processes, device kind
TARGETS = {
    "v4:2x2x4": (16, 4, "TPU v4"),
    "v5e:4x4": (16, 4, "TPU v5 lite"),
    "v5p:2x2x4": (16, 4, "TPU v5"),
    "v6e:4x4": (16, 4, "TPU v6 lite"),
    "tpu7x:2x2x1": (8, 1, "TPU7x"),
    "h100:2x8": (16, 2, "NVIDIA H100 80GB HBM3"),
    "h200:1x8": (8, 1, "NVIDIA H200 141GB HBM3e"),
    "a100-40:2x4": (8, 2, "NVIDIA A100-SXM4-40GB"),
    "a100-80:1x2": (2, 1, "NVIDIA A100-SXM4-80GB"),
    "b200:2x8": (16, 2, "NVIDIA B200"),
    "gb200:2x4": (8, 2, "NVIDIA GB200"),
}
POD = {"v4:4x4x4": 64, "v5e:16x16": 256, "v5p:16x16x16": 4096, "v6e:16x16": 256, "tpu7x:4x4x4": 128, "h100:128x8": 1024}


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_programs_compile(target):
    num_devices, num_processes, kind = TARGETS[target]
    devices = topology(target)
    assert len(devices) == num_devices
    assert [device.process_index for device in devices] == sorted(device.process_index for device in devices)
    assert len({device.process_index for device in devices}) == num_processes
    assert {device.device_kind for device in devices} == {kind}
    mesh = jax.make_mesh((num_devices,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    assert set(mesh.devices.flat) == set(devices)
    compiled = compile_product(mesh)
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * (4 * 256 + 256 * 256 // num_devices)


@pytest.mark.compile
@pytest.mark.parametrize("target", POD)
def test_whole_pods(target):
    assert len(topology(target)) == POD[target]


@pytest.mark.compile
@pytest.mark.parametrize("target", ["v5e:4x4*2", "h100:2x4*2"])
def test_slices(target):
    devices = topology(target)
    if devices[0].platform == "tpu":  # GPUs that are only described do not know their slice
        assert [device.slice_index for device in devices] == [0] * 16 + [1] * 16
    mesh = Mesh(np.array(devices).reshape(2, -1), ("replica", "data"), axis_types=(AxisType.Auto,) * 2)
    text = compile_product(mesh).as_text()
    assert "all-gather" in text


def compile_product(mesh):
    """`sum(x @ w)` with both sides split over data."""
    split = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((4 * mesh.shape["data"], 256), jnp.bfloat16, sharding=split)
    w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=split)
    return jax.jit(lambda x, w: jnp.tanh(x @ w).sum()).lower(x, w).compile()


@pytest.mark.compile
def test_environment_is_as_before():
    before = dict(os.environ)
    topology("v5e:2x2")
    topology("h100:1x2")
    assert dict(os.environ) == before


@pytest.mark.compile
@pytest.mark.parametrize("target", ["v5e:3x3", "v5e:16x16x16"])
def test_machines_that_nobody_builds(target):
    with pytest.raises(ValueError, match=r"jzero\.topology"):
        topology(target)


def test_the_public_name_is_the_function():
    assert topologies is topology


@pytest.mark.parametrize(
    ("target", "parsed"),
    [
        ("v5e:4x4", Target("v5e", (4, 4), 1)),
        ("V5P:16x16x16", Target("v5p", (16, 16, 16), 1)),
        ("v5e:4x4*2", Target("v5e", (4, 4), 2)),
        ("7x:4x4x4", Target("tpu7x", (4, 4, 4), 1)),
        ("h100:2x8", Target("h100", (2, 8), 1)),
        ("a100-40:2x8", Target("a100-40", (2, 8), 1)),
    ],
)
def test_parse(target, parsed):
    assert parse(target) == parsed


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("h101:2x8", "Did you mean 'h100'"),
        ("v5:4x4", "Known: v4, v5e"),
        ("h100", "MODEL:GRID"),
        ("h100:2x8x1", "hosts x devices per host"),
        ("v5p:4x4", "3 sizes"),
        ("h100:0x8", "none of them 0"),
        ("v5e:4x4*0", "none of them 0"),
        ("", "MODEL:GRID"),
    ],
)
def test_unknown_targets(target, message):
    with pytest.raises(ValueError, match=message) as caught:
        topology(target)
    assert repr(target) in str(caught.value)


@pytest.mark.parametrize(("target", "wheel"), [("v5e:4x4", "libtpu"), ("h100:2x8", "jax-cuda13-plugin")])
def test_missing_wheel(monkeypatch, target, wheel):
    monkeypatch.setattr(importlib.metadata, "version", versions_without(wheel))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(NotImplementedError, match=rf"{wheel} is not installed[\s\S]*jzero\[compile\]"):
        topology(target)


def versions_without(missing, real=importlib.metadata.version):
    def version(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    return version


def test_wheel_of_another_version(monkeypatch):
    versions = {"jax-cuda13-plugin": "0.10.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    with pytest.raises(NotImplementedError, match=rf"0\.10\.0[\s\S]*jax-cuda13-plugin=={real('jaxlib')}"):
        topology("h100:2x8")


def test_memory():
    assert memory_bytes("h100:2x8") == 84942979072
    assert memory_bytes("v5e:16x16") == 16 * 1024**3


@pytest.mark.parametrize("model", [*GPUS, *TPUS])
def test_specs(model):
    spec = (GPUS | TPUS)[model]
    assert 10e9 < spec.memory_bytes < 300e9
    if model in GPUS:
        assert f"core_count: {spec.core_count}" in target_config(spec)
