"""States as users of each framework keep them: layout name -> (state, paths of the parameters), all abstract."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.training import train_state

WIDTH = 24  # 3 and 8 divide it
SHAPES = {
    "embed": {"kernel": (4 * WIDTH, WIDTH)},
    "block_0": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
    "block_1": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},  # as block_0: only paths tell them apart
    "head": {"kernel": (WIDTH, 3 * WIDTH), "bias": (3 * WIDTH,)},
}
NUM_MATRICES, NUM_VECTORS = 4, 3


def params():
    return jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def names(prefix=""):
    paths = [f"{module}/{name}" for module, leaves in SHAPES.items() for name in leaves]
    return {prefix + path for path in paths}


def tuple_layout(tx):
    return (params(), tx.init(params())), names("0/")


def dict_layout(tx):
    state = {"model": params(), "optimizer": tx.init(params()), "step": 0, "rng": jax.random.key(0)}
    return state, names("model/")


def flat_dict_layout(tx):
    return {**params(), "tx": tx.init(params())}, names()


def linen_layout(tx):
    state = train_state.TrainState.create(apply_fn=nn.Dense(3).apply, params=params(), tx=tx)
    return state, names("params/")


def linen_variables_layout(tx):
    """The parameters beside batch statistics in one dict; the optimizer knows the parameters only."""
    stats = {"block_0": {"mean": jnp.zeros(WIDTH), "var": jnp.zeros(WIDTH)}}
    return ({"params": params(), "batch_stats": stats}, tx.init(params())), names("0/params/")


class Block(nnx.Module):
    def __init__(self, shapes):
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))


class NnxModel(nnx.Module):
    """The same parameters as variables, with batch statistics and random counters among them."""

    def __init__(self):
        for name, shapes in SHAPES.items():
            setattr(self, name, Block(shapes))
        self.norm = nnx.BatchStat(jnp.zeros(WIDTH))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))


def nnx_state_layout(tx):
    """nnx.split, with optax directly on the State of the parameters."""
    _, weights, rest = nnx.split(NnxModel(), nnx.Param, ...)
    return (weights, tx.init(weights), rest), names("0/")


def nnx_optimizer_layout(tx):
    """The documented pattern for nnx.Optimizer: graphdef, state = nnx.split((model, optimizer))."""
    model = NnxModel()
    return nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))[1], names("0/")


class EqxModel(eqx.Module):
    embed: dict
    block_0: dict
    block_1: dict
    head: dict
    activation: object


def equinox_layout(tx):
    model = EqxModel(**params(), activation=jax.nn.relu)
    arrays, _ = eqx.partition(model, eqx.is_array)
    return (arrays, tx.init(eqx.filter(model, eqx.is_inexact_array))), names("0/")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inner:
    weights: dict
    moments: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outer:
    train: Inner
    counter: jax.Array


def dataclass_layout(tx):
    return Outer(Inner(params(), tx.init(params())), jnp.zeros((), "int32")), names("train/weights/")


LAYOUTS = {
    "tuple": tuple_layout,
    "dict": dict_layout,
    "flat_dict": flat_dict_layout,
    "linen": linen_layout,
    "linen_variables": linen_variables_layout,
    "nnx_state": nnx_state_layout,
    "nnx_optimizer": nnx_optimizer_layout,
    "equinox": equinox_layout,
    "dataclass": dataclass_layout,
}
