"""Every kernel through the real TPU and GPU compilers, at every size of its table; one of each kernel in the default suite."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from fixtures.compilers import compilers as compilers
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jzero
import pallas_kernels
from pallas_kernels import dispatch, fused_optimizer, norm, quantize
from pallas_kernels.attention import shapes as attention_shapes
from pallas_kernels.bench import resources
from pallas_kernels.fused_optimizer import shapes as leaf_shapes
from pallas_kernels.norm import shapes
from pallas_kernels.quantize import shapes as block_shapes
from pallas_kernels.quantize.formats import FORMATS

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
VMEM_BYTES = 32 * 2**20  # what kernels for TPUs ask for at most
# Shape -> why no kernel takes it, or none of those targets': listed, not left out.
UNSUPPORTED = {"gpt2-1.5b": ("", "multiple of 128"), "llama-70b": ("h100", "up to 4096 long")}


def compile_for(target, fn, *shapes, donate=(), told=None):
    """`fn` on arrays of these (shape, dtype) for one described device; nothing is spilled. `told` gets what kernels take."""
    device = jzero.topology(target)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    described = contextlib.nullcontext()
    if device.platform != "tpu":  # Mosaic GPU asks which device it compiles for
        found = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="cuda")
        described = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=found))
    with pallas_kernels.target(device.device_kind), described, resources.listening() as said:
        compiled = jax.jit(fn, donate_argnums=tuple(donate)).lower(*args).compile()
    found = resources.uses(compiled, said)
    for use in found:
        assert not use.spill_bytes, f"{use.spill_bytes} bytes are spilled, {use.registers} registers are not enough"
        assert (use.vmem_bytes or 0) <= VMEM_BYTES
    if told is not None:
        told += found
    return compiled


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
    of_target, reason = UNSUPPORTED.get(name, (None, ""))
    if of_target is not None and target.startswith(of_target):
        with pytest.raises(NotImplementedError, match=reason):
            compile_for(target, gradient, *args)
        return
    text = compile_for(target, gradient, *args).as_text()
    kernel = "tpu_custom_call" if "tpu" in TARGETS[target] else "mosaic_gpu"
    assert text.count(f'custom_call_target="{kernel}') == 2  # forward and backward, and nothing merged or dropped


def num_kernels(target, text):
    return text.count(f'custom_call_target="{"tpu_custom_call" if "tpu" in TARGETS[target] else "mosaic_gpu"}')


def quantize_cases():
    for target in TARGETS:
        for name in block_shapes.SHAPES:
            for format, form in FORMATS.items():
                for is_stochastic in (False, True) if form.can_round else (False,):
                    quick = (name, format, is_stochastic) == ("llama-8b mlp", "int4", True) and target in (
                        "v5e:2x2",
                        "h100:1x1",
                    )
                    yield pytest.param(target, name, format, is_stochastic, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.compile
@pytest.mark.parametrize(("target", "name", "format", "is_stochastic"), list(quantize_cases()))
def test_quantizers_compile(target, name, format, is_stochastic):
    shape = block_shapes.SHAPES[name]

    def both(x, error):
        seed = 3 if is_stochastic else None
        codes, scales, left = quantize.quantize_with_feedback(x, error, format, seed=seed, implementation=TARGETS[target])
        back = quantize.dequantize(codes, scales, format, dtype=x.dtype, implementation=TARGETS[target])
        return codes, scales, left, back

    compiled = compile_for(target, both, (shape, jnp.bfloat16), (shape, jnp.float32))
    assert num_kernels(target, compiled.as_text()) == 2
    # Nothing of the array's size in between but scales in another layout; on a TPU bytes that become 8-bit floats are copied.
    # And on TPU 7x the bfloat16 that comes back is copied too, at the program's end; `quantize` alone leaves nothing there.
    copies = ("tpu" in TARGETS[target] and format.startswith("float8")) + 2 * target.startswith("tpu7x")
    scales = 2 * shape[0] * 512  # a row of scales takes 128 columns of float32 in memory, however few there are
    assert compiled.memory_analysis().temp_size_in_bytes <= shape[0] * shape[1] * copies + scales


def optimizer_cases():
    for target in TARGETS:
        for rule in ("adamw", "lion"):
            for name in leaf_shapes.SHAPES:
                for moments in ("float32", "bfloat16", "uint8"):
                    quick = (target, rule, name, moments) in {
                        ("v5e:2x2", "adamw", "llama-8b mlp", "bfloat16"), ("h100:1x1", "adamw", "llama-8b mlp", "bfloat16"),
                    }  # fmt: skip
                    yield pytest.param(target, rule, name, moments, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.compile
@pytest.mark.parametrize(("target", "rule", "name", "moments"), list(optimizer_cases()))
def test_optimizers_compile(target, rule, name, moments):
    leaves, num_moments = leaf_shapes.SHAPES[name], {"adamw": 2, "lion": 1}[rule]
    scaled = [moments == "uint8" and shape[-1] % 256 == 0 and len(shape) > 1 for shape in leaves]

    def step(rate, count, grads, rest):
        rows = [
            fused_optimizer.Leaf(param, grad, tuple(kept), tuple(scales))
            for grad, (param, kept, scales) in zip(grads, rest, strict=True)
        ]
        update = getattr(fused_optimizer, rule)
        return update(rows, rate=rate, count=count, returns="params", copy=jnp.bfloat16, implementation=TARGETS[target])

    def flat(rate, count, *arrays):
        left, num = iter(arrays), num_moments
        grads = [next(left) for _ in leaves]
        rest = [
            (next(left), [next(left) for _ in range(num)], [next(left) for _ in range(num * is_scaled)]) for is_scaled in scaled
        ]
        return step(rate, count, grads, rest)

    args = [((), jnp.float32), ((), jnp.int32), *[(shape, jnp.bfloat16) for shape in leaves]]
    for shape, is_scaled in zip(leaves, scaled, strict=True):
        kept = jnp.float32 if moments == "uint8" and not is_scaled else jnp.dtype(moments)
        args += [(shape, jnp.float32), *[(shape, kept)] * num_moments]
        args += [((*shape[:-1], shape[-1] // 256), jnp.float32)] * (num_moments * is_scaled)
    text = compile_for(target, flat, *args, donate=range(2 + len(leaves), len(args))).as_text()
    small = [shape for shape in leaves if jnp.prod(jnp.array(shape)) < 2**16]
    assert num_kernels(target, text) == len(leaves) - len(small) + bool(small)  # small ones share a launch


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
