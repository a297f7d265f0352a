"""A split sequence on the compilers: what attention sends, that activations are not gathered, and that work is divided.

Counted per layer and step, bytes per device by the ring algorithm, for pieces of T_loc positions, H heads, K of them for keys,
of C elements in bfloat16:

- exchange of heads: q, k and v in one all-to-all, the result in another, forward; the same two backward;
- ring: S - 1 permutes of keys and values forward, as many backward and S - 1 of their gradients in float32; and for the balance
  q, k, v and the result once each forward, the result's gradient (and its product with the result, a float32 per query and
  head) and those of q, k, v backward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.compilers import compilers as compilers

import jzero
from jzero import models
from jzero.audit import moved

DATA, PIECES, ROWS, LENGTH = 2, 4, 4, 1024
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 4, 64
DIM = HEADS * HEAD_DIM
SMALL_BYTES = 64 * 1024  # per step: norms, scalars, tokens


def model(kind, **changes):
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM, "ffn_dim": 1536, **changes}
    return models.build("llama-tiny", vocab_size=2048, max_seq=LENGTH, attention_kind=kind, **sizes)


def lowered(kind, target, stage):
    loss = model(kind)
    train_step = jzero.make_train_step(loss.loss, optax.adamw(1e-3), precision="bf16")
    mesh = jzero.make_mesh(data=DATA, sequence=PIECES, devices=jzero.topology(target)[: DATA * PIECES])
    step = jzero.shard(train_step, stage=stage, mesh=mesh)
    state = jax.eval_shape(lambda: train_step.init(loss.init(jax.random.key(0))))
    return step, state, jax.ShapeDtypeStruct((ROWS, LENGTH + 1), jnp.int32)


@functools.cache
def report(kind, target, stage):
    step, state, tokens = lowered(kind, target, stage)
    return step.report(state, tokens)


def expected(kind):
    """Bytes per device and step that attention sends, by kind of collective."""
    position = ROWS // DATA * LENGTH // PIECES * HEAD_DIM * 2  # of one head, bfloat16
    around = (HEADS + 2 * KV_HEADS) + HEADS  # q, k, v and the result
    if kind == "ulysses":
        return {"all-to-all": 2 * LAYERS * moved("all-to-all", around * position, PIECES)}
    keys, dots = 2 * KV_HEADS * position, HEADS * position // HEAD_DIM * 2  # float32 is twice as wide
    forward = (PIECES - 1) * keys + around * position
    backward = (PIECES - 1) * (keys + 2 * keys) + around * position + dots
    return {"collective-permute": LAYERS * (forward + backward)}


CASES = [
    pytest.param("ulysses", "h100:1x8", 3),
    *(
        pytest.param(kind, target, stage, marks=pytest.mark.slow)
        for kind, target, stage in (
            ("ring", "h100:1x8", 3), ("ulysses", "h100:1x8", 1), ("ring", "h100:1x8", 2), ("ulysses", "v5e:2x4", 3),
            ("ring", "v5e:2x4", 3),
        )
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(("kind", "target", "stage"), CASES)
def test_traffic(kind, target, stage):
    found = report(kind, target, stage).wire_bytes
    sent = {name: row["measured"] for name, row in found["sequence"].items() if name in ("all-to-all", "collective-permute")}
    for name in sent:
        wanted = expected(kind).get(name, 0)
        assert wanted <= sent[name] <= wanted + SMALL_BYTES, (name, sent[name], wanted)
    over_data = {column: sum(row[column] for row in found["data"].values()) for column in ("measured", "formula")}
    assert over_data["measured"] <= 1.05 * over_data["formula"], found
    of_embedding = moved("all-gather", ROWS // DATA * LENGTH * DIM * 2, PIECES)  # its gradient: rows for all positions
    gathered = found["sequence"]["all-gather"]
    assert gathered["measured"] <= 1.05 * gathered["formula"] + of_embedding + SMALL_BYTES, "activations are gathered"


def flops(sizes, kind):
    """Of one device, on the CPU compiler: cost_analysis counts a loop's body once, in both programs."""
    small = model(kind, num_heads=4, num_kv_heads=2, dim=64, ffn_dim=128)
    train_step = jzero.make_train_step(small.loss, optax.sgd(0.1))
    mesh = jzero.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    step = jzero.shard(train_step, stage=3, mesh=mesh)
    state = jax.eval_shape(lambda: train_step.init(small.init(jax.random.key(0))))
    return step.lower(state, jax.ShapeDtypeStruct((ROWS, 65), jnp.int32)).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_flops_fall_by_the_size_of_the_axis(kind):
    """Without the split of activations each device of `sequence` would repeat the others' work."""
    ratio = flops({"data": 2}, kind) / flops({"data": 2, "sequence": 4}, kind)
    assert ratio >= 0.9 * 4, ratio


def test_what_the_state_rests_in_is_divided_too():
    """ZeRO over data x sequence: every large leaf is an eighth on each device, and the report's formula says so."""
    small = model("ulysses", num_heads=4, num_kv_heads=2, dim=64, ffn_dim=128)
    train_step = jzero.make_train_step(small.loss, optax.sgd(0.1))
    step = jzero.shard(train_step, stage=3, mesh=jzero.make_mesh(data=2, sequence=4))
    state = jax.eval_shape(lambda: train_step.init(small.init(jax.random.key(0))))
    large = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= 1024]
    shardings = [sharding for sharding in jax.tree.leaves(step.shardings(state).params) if not sharding.is_fully_replicated]
    assert len(large) == len(shardings)
    for leaf, sharding in zip([leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= 1024], shardings, strict=True):
        assert np.prod(sharding.shard_shape(leaf.shape)) * 8 == leaf.size
