"""From options and devices to everything a run needs: model, mesh, batches, with every default filled in."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jzero import data, models, rules
from jzero import mesh as meshes
from jzero._errors import explain
from jzero.attention import Kind
from jzero.bench.options import WHO, Options
from jzero.models import gpt2, llama, mixtral

_VOCAB_MULTIPLE = 128
_NUM_WARMUP_STEPS = 5


class Setup(NamedTuple):
    """One bench: what all contenders share."""

    options: Options
    model: models.Model
    mesh: jax.sharding.Mesh
    precision: str
    batch: int
    seq: int
    ids: np.ndarray
    optimizer: optax.GradientTransformation
    accumulate: int
    attention_kind: Kind  # where the mesh has an axis `sequence`

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def batch_sharding(self) -> jax.NamedSharding:
        tokens = jax.ShapeDtypeStruct((self.batch, self.seq + 1), np.int32)
        return jax.NamedSharding(self.mesh, rules.batch_spec(tokens, self.mesh))

    @property
    def tensor_rules(self) -> tuple[Any, ...]:
        """The model's own split over `tensor`, and of experts over `expert`, where the mesh has that axis."""
        of_gpt2 = gpt2.pipeline_tensor_rules if meshes.axis_size(self.mesh, "pipe") > 1 else gpt2.tensor_rules
        if isinstance(self.model.config, models.MixtralConfig):
            by_model = mixtral.tensor_rules if meshes.axis_size(self.mesh, "tensor") > 1 else mixtral.expert_rules
            return by_model if meshes.axis_size(self.mesh, ("tensor", "expert")) > 1 else ()
        by_model = of_gpt2 if isinstance(self.model.config, models.GPT2Config) else llama.tensor_rules
        return by_model if meshes.axis_size(self.mesh, "tensor") > 1 else ()


def resolve(options: Options, devices: list[jax.Device]) -> Setup:
    """Fill in the defaults and check what depends on the devices.

    Raises:
        ValueError: a mesh that the devices do not fit, or a batch or sequence that model or mesh do not allow.
    """
    on_cpu = devices[0].platform == "cpu"
    mesh = _mesh(options.mesh, devices)
    num_pipe_stages = meshes.axis_size(mesh, "pipe")
    accumulate = options.accumulate or (2 * num_pipe_stages if num_pipe_stages > 1 else 1)
    multiple = meshes.axis_size(mesh, meshes.batch_axes(mesh)) * accumulate
    batch = options.batch or multiple * (2 if on_cpu else 8)
    _check_batch(batch, multiple, mesh, accumulate)
    config = models.preset(options.model)
    seq = options.seq or min(config.max_seq, 128 if on_cpu else 1024)
    _check_seq(seq, config.max_seq, options)
    _check_heads(config, mesh, options)
    kind = _attention_kind(config, mesh, seq)
    padded = math.ceil(config.vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    model = models.build(options.model, padded_vocab_size=padded, attention_kind=kind)
    precision = options.precision or ("fp32" if on_cpu else "bf16")
    rate = optax.linear_schedule(options.learning_rate / _NUM_WARMUP_STEPS, options.learning_rate, _NUM_WARMUP_STEPS)
    ids = data.load(options.data)
    return Setup(options, model, mesh, precision, batch, seq, ids, optax.adamw(rate), accumulate, kind)


def _mesh(sizes: dict[str, int], devices: list[jax.Device]) -> jax.sharding.Mesh:
    """Of all devices in jax's best order, or of the first few where fewer are asked for."""
    if "data" in sizes and math.prod(sizes.values()) < len(devices):
        devices = devices[: math.prod(sizes.values())]
    return meshes.make_mesh(**sizes, devices=None if len(devices) == jax.device_count() else devices)


def batches(setup: Setup) -> Iterator[jax.Array]:
    """tokens[B_(replica,data), T + 1] on the mesh; every process draws the same and keeps its part."""
    vocab_size, seed = setup.model.config.vocab_size, setup.options.seed
    for tokens in data.batches(setup.ids, batch=setup.batch, seq=setup.seq, vocab_size=vocab_size, seed=seed):
        yield jax.make_array_from_callback(tokens.shape, setup.batch_sharding, tokens.__getitem__)


def _attention_kind(config: models.ModelConfig, mesh: jax.sharding.Mesh, seq: int) -> Kind:
    """An exchange of heads where `sequence` divides those of a device, else a ring."""
    num = meshes.axis_size(mesh, "sequence")
    num_heads = config.num_heads // meshes.axis_size(mesh, "tensor")
    kind: Kind = "ulysses" if num_heads % num == 0 else "ring"
    pieces = num * (2 if kind == "ring" else 1)
    if seq % pieces:
        problem = f"{kind} attention on a mesh with sequence={num} splits a sequence into {pieces} equal pieces"
        legal = " or ".join(str(size) for size in (seq // pieces * pieces, -(-seq // pieces) * pieces) if size)
        raise ValueError(
            explain(WHO, problem, found=[f"--seq {seq}"], context=f"mesh {meshes.describe(mesh)}", fix=f"Use {legal}.")
        )
    return kind


def _check_heads(config: models.ModelConfig, mesh: jax.sharding.Mesh, options: Options) -> None:
    num, num_kv_heads = meshes.axis_size(mesh, "tensor"), getattr(config, "num_kv_heads", config.num_heads)
    if num_kv_heads % num:
        legal = ", ".join(str(size) for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0)
        problem = f"'tensor' divides the {num_kv_heads} heads of keys and values of {options.model}"
        raise ValueError(explain(WHO, problem, found=[f"tensor={num}"], fix=f"Use a size among {legal}."))


def _check_batch(batch: int, multiple: int, mesh: jax.sharding.Mesh, accumulate: int) -> None:
    if batch % multiple:
        legal = " or ".join(
            str(size) for size in (batch // multiple * multiple, math.ceil(batch / multiple) * multiple) if size
        )
        problem = f"the batch must be a multiple of {multiple}: the batch axes' size times --accumulate {accumulate}"
        context, fix = f"mesh {meshes.describe(mesh)}", f"Use --batch {legal}."
        raise ValueError(explain(WHO, problem, found=[f"--batch {batch}"], context=context, fix=fix))


def _check_seq(seq: int, max_seq: int, options: Options) -> None:
    if seq > max_seq:
        problem, fix = f"{options.model} has sequences of at most {max_seq} tokens", f"Use --seq {max_seq} or another model."
        raise ValueError(explain(WHO, problem, found=[f"--seq {seq}"], fix=fix))
