"""Every kernel through the real TPU and GPU compilers, at every size of its table; one of each kernel in the default suite."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from fixtures.compilers import compilers as compilers
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jzero
import pallas_kernels
from pallas_kernels import norm
from pallas_kernels.norm import shapes

TARGETS = {
    "v5e:2x2": "mosaic_tpu", "v5p:2x2x1": "mosaic_tpu", "v6e:2x2": "mosaic_tpu", "tpu7x:2x2x1": "mosaic_tpu",
    "h100:1x1": "mosaic_gpu",
}  # fmt: skip
QUICK = {("v5e:2x2", "llama-8b", True), ("h100:1x1", "llama-8b", True)}
UNSUPPORTED = {"gpt2-1.5b": "multiple of 128"}  # shape -> why no kernel takes it: listed, not left out


def compile_for(target, fn, *shapes):
    """`fn` on arrays of these (shape, dtype) for one device that is not there."""
    device = jzero.topology(target)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    described = contextlib.nullcontext()
    if device.platform != "tpu":  # Mosaic GPU asks which device it compiles for
        found = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="cuda")
        described = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=found))
    with pallas_kernels.target(device.device_kind), described:
        return jax.jit(fn).lower(*args).compile()


def norm_cases():
    for target in TARGETS:
        for name in shapes.SHAPES:
            for centred in (True, False):
                quick = (target, name, centred) in QUICK
                yield pytest.param(target, name, centred, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.compile
@pytest.mark.parametrize(("target", "name", "centred"), list(norm_cases()))
def test_norms_compile(target, name, centred):
    num_rows, dim = shapes.SHAPES[name]
    rows, params = ((num_rows, dim), jnp.bfloat16), ((dim,), jnp.float32)

    def gradient(x, residual, scale, bias, dy, dh):
        def outs(x, residual, *params):
            run = norm.layer_norm if centred else norm.rms_norm
            return run(x, *params, residual=residual, implementation=TARGETS[target])

        params = (scale, bias) if centred else (scale,)
        value, pull = jax.vjp(outs, x, residual, *params)
        return value, pull((dy, dh))

    args = (rows, rows, params, params, rows, rows)
    if name in UNSUPPORTED:
        with pytest.raises(NotImplementedError, match=UNSUPPORTED[name]):
            compile_for(target, gradient, *args)
        return
    text = compile_for(target, gradient, *args).as_text()
    kernel = "tpu_custom_call" if "tpu" in TARGETS[target] else "mosaic_gpu"
    assert text.count(f'custom_call_target="{kernel}') == 2  # forward and backward, and nothing merged or dropped
