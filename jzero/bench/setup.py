"""From options and devices to everything a run needs: model, mesh, batches, with every default filled in."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax

from jzero import data, models
from jzero import mesh as meshes
from jzero._errors import explain
from jzero.bench.options import WHO, Options

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

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def batch_sharding(self) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, jax.P(meshes.batch_axes(self.mesh)))


def resolve(options: Options, devices: list[jax.Device]) -> Setup:
    """Fill in the defaults and check what depends on the devices.

    Raises:
        ValueError: a mesh that the devices do not fit, or a batch or sequence that model or mesh do not allow.
    """
    on_cpu = devices[0].platform == "cpu"
    mesh = _mesh(options.mesh, devices)
    multiple = meshes.axis_size(mesh, meshes.batch_axes(mesh)) * options.accumulate
    batch = options.batch or multiple * (2 if on_cpu else 8)
    _check_batch(batch, multiple, mesh, options)
    config = models.preset(options.model)
    seq = options.seq or min(config.max_seq, 128 if on_cpu else 1024)
    _check_seq(seq, config.max_seq, options)
    padded = math.ceil(config.vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    model = models.build(options.model, padded_vocab_size=padded)
    precision = options.precision or ("fp32" if on_cpu else "bf16")
    rate = optax.linear_schedule(options.learning_rate / _NUM_WARMUP_STEPS, options.learning_rate, _NUM_WARMUP_STEPS)
    return Setup(options, model, mesh, precision, batch, seq, data.load(options.data), optax.adamw(rate))


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


def _check_batch(batch: int, multiple: int, mesh: jax.sharding.Mesh, options: Options) -> None:
    if batch % multiple:
        legal = " or ".join(
            str(size) for size in (batch // multiple * multiple, math.ceil(batch / multiple) * multiple) if size
        )
        problem = f"the batch must be a multiple of {multiple}: the batch axes' size times --accumulate {options.accumulate}"
        context, fix = f"mesh {meshes.describe(mesh)}", f"Use --batch {legal}."
        raise ValueError(explain(WHO, problem, found=[f"--batch {batch}"], context=context, fix=fix))


def _check_seq(seq: int, max_seq: int, options: Options) -> None:
    if seq > max_seq:
        problem, fix = f"{options.model} has sequences of at most {max_seq} tokens", f"Use --seq {max_seq} or another model."
        raise ValueError(explain(WHO, problem, found=[f"--seq {seq}"], fix=fix))
