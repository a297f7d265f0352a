"""The meshes that laws are tried on."""

import math

import jax

import jzero

# name -> axis sizes; 1 shards nothing, 3 divides neither 8 nor the devices, and the last repeats shards over replicas
MESHES = {"1": {"data": 1}, "2": {"data": 2}, "3": {"data": 3}, "8": {"data": 8}, "2x4": {"replica": 2, "data": 4}}
# with further axes, over which rules split parameters
FURTHER = {
    "data 4 tensor 2": {"data": 4, "tensor": 2},
    "data 2 tensor 4": {"data": 2, "tensor": 4},
    "data 1 tensor 8": {"data": 1, "tensor": 8},
    "replica 2 data 2 tensor 2": {"replica": 2, "data": 2, "tensor": 2},
}
# with experts spread over an axis, over which examples are split too
EXPERT = {
    "expert 4 data 2": {"expert": 4, "data": 2},
    "expert 2 data 2 tensor 2": {"expert": 2, "data": 2, "tensor": 2},
    "replica 2 expert 2 data 2": {"replica": 2, "expert": 2, "data": 2},
    "expert 8": {"expert": 8, "data": 1},
}
# with an axis that splits each example, for models that attend by `jzero.attention`
SEQUENCE = {
    "data 2 sequence 4": {"data": 2, "sequence": 4},
    "data 2 sequence 2 tensor 2": {"data": 2, "sequence": 2, "tensor": 2},
    "data 1 sequence 4": {"data": 1, "sequence": 4},
    "replica 2 data 2 sequence 2": {"replica": 2, "data": 2, "sequence": 2},
}


def make(name):
    sizes = {**MESHES, **FURTHER, **EXPERT, **SEQUENCE}[name]
    return jzero.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
