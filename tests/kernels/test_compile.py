"""Every kernel through the real TPU and GPU compilers, at every size of its table; one of each kernel in the default suite."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from fixtures.compilers import compilers as compilers
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jzero
import pallas_kernels
from pallas_kernels import dispatch, norm
from pallas_kernels.attention import shapes as attention_shapes
from pallas_kernels.norm import shapes

TARGETS = {
    "v5e:2x2": "mosaic_tpu", "v5p:2x2x1": "mosaic_tpu", "v6e:2x2": "mosaic_tpu", "tpu7x:2x2x1": "mosaic_tpu",
    "h100:1x1": "mosaic_gpu",
}  # fmt: skip
ATTENTION_TARGETS = (
    *((target, "splash") for target in TARGETS if not target.startswith("h100")), *((target, "chunked") for target in TARGETS),
    ("h100:1x1", "cudnn"),
)  # fmt: skip
ATTENTION_QUICK = {("v5e:2x2", "splash", "gpt2-124m"), ("h100:1x1", "cudnn", "llama-8b")}
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


def attention_cases():
    for target, implementation in ATTENTION_TARGETS:
        for name in attention_shapes.SHAPES:
            quick = (target, implementation, name) in ATTENTION_QUICK
            yield pytest.param(target, implementation, name, marks=[] if quick else [pytest.mark.slow])


@pytest.fixture
def cudnn_described(monkeypatch):
    """JAX asks the tracing machine's GPU for its cuDNN; here a described one answers. XLA needs no cuDNN to compile."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.compile
@pytest.mark.parametrize(("target", "implementation", "name"), list(attention_cases()))
def test_attention_compiles(target, implementation, name, cudnn_described):
    """Value and gradients in bfloat16; the kernels are there, and no scores are kept."""
    shape = attention_shapes.SHAPES[name]
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    args = [((shape.batch, shape.length, num, shape.head_dim), jnp.bfloat16) for num in heads]
    options = {"sliding_window": shape.sliding_window, "soft_cap": shape.soft_cap, "implementation": implementation}

    def gradient(q, k, v, g):
        value, pull = jax.vjp(lambda *parts: pallas_kernels.attention(*parts, **options), q, k, v)
        return value, pull(g)

    if implementation == "cudnn" and shape.soft_cap is not None:
        with pytest.raises(NotImplementedError, match="no soft cap"):
            compile_for(target, gradient, *args)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_is_local", lambda: True)  # one device is described, and nothing is split
        compiled = compile_for(target, gradient, *args)
    text = compiled.as_text()
    kernels = {"splash": ("tpu_custom_call", 3), "cudnn": ("__cudnn$fmha", 2), "chunked": ("", 0)}
    target_name, number = kernels[implementation]
    assert not number or text.count(f'custom_call_target="{target_name}') == number
    scores = 4 * shape.batch * shape.num_heads * shape.length**2
    if shape.length >= 8192:
        assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * scores
