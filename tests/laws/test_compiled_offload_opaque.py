"""What offload takes off a device where jzero did not write the step, on the real TPU compiler: the same figures as elsewhere.

Bytes at rest on the device fall by exactly what moves; between the two parts of the step is one gradient, in the dtype that the
step computes it in; temporaries grow by two buckets at most.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from fixtures.compilers import compilers as compilers
from test_compiled_offload import BUCKET_BYTES, at_rest, layer, mesh

import jzero
from jzero import remat

pytestmark = pytest.mark.compile
LAYERS, WIDTH, ROWS = 4, 512, 16
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def loss_fn(params, x):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x, _ = jax.lax.scan(remat.wrap_layer(layer), x, params["layers"])
    return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)


def train_step(state, x):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], x)
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss


def make_state():
    zeros = lambda *shape: jnp.zeros(shape)
    params = {"layers": {"up": zeros(LAYERS, WIDTH, 4 * WIDTH), "down": zeros(LAYERS, 4 * WIDTH, WIDTH)}}
    params["head"] = zeros(WIDTH, 8 * WIDTH)
    return {"params": params, "opt_state": OPTIMIZER.init(params)}


@functools.cache
def report(stage, **asked):
    offload = jzero.Offload(opt_state="host", bucket_bytes=BUCKET_BYTES // 64, **asked) if asked else None
    step = jzero.shard(train_step, stage=stage, mesh=mesh(), offload=offload)
    return step.report(jax.eval_shape(make_state), jax.ShapeDtypeStruct((16 * ROWS, WIDTH), jnp.bfloat16))


@pytest.mark.slow
def test_parameters_go_too():
    """They are on the device, in their shards, from the step's beginning to its end."""
    whole, cut = report(3), report(3, params="host")
    num_params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make_state)["params"]))
    moved = 3 * 4 * num_params // 16
    assert cut.offload["at_rest"]["pinned_host"] == moved == at_rest(whole) - at_rest(cut)
    fetched, grads = 4 * num_params // 16, cut.offload["grad_bytes"]
    assert cut.temp_bytes <= whole.temp_bytes + 2 * BUCKET_BYTES // 64 + grads + fetched


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_moves_is_gone_from_the_device(stage):
    num_params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make_state)["params"]))
    whole, cut = report(stage), report(stage, update="device")
    moved = 2 * 4 * num_params // 16
    assert cut.offload["at_rest"]["pinned_host"] == moved == cut.offload["moved_bytes"]
    assert at_rest(whole) - at_rest(cut) == moved
    assert cut.offload["grad_bytes"] == 2 * num_params // 16  # bfloat16, in shards at every stage
    assert cut.temp_bytes <= whole.temp_bytes + 2 * BUCKET_BYTES // 64 + cut.offload["grad_bytes"]
    for axis, kinds in cut.wire_bytes.items():
        for kind, row in kinds.items():
            assert row["measured"] <= 1.05 * row["formula"] + 4096, (axis, kind)
