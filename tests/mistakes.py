"""Mistakes, and the words that each part of their messages must have: `TABLE`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import jzero

TX = optax.sgd(0.1, momentum=0.9)
STEP, MAKE, MESH = "jzero.shard", "jzero.make_train_step", "jzero.make_mesh"
FLOATS, ROWS = (64, 32), (16, 64)


class Bad(NamedTuple):
    """A mistake and the words of its message. `found`: a line for each value or leaf that is wrong."""

    call: Callable[[], object]
    error: type[Exception]
    expected: str
    found: tuple[str, ...]
    fix: str
    context: str = ""
    who: str = STEP


def params():
    """Of numpy, for which nothing is compiled: whatever a mistake compiles is jzero's."""
    return {"w": np.ones(FLOATS, np.float32), "b": np.zeros(FLOATS[1], np.float32)}


def loss(p, x):
    return jnp.mean((x @ p["w"] + p["b"]) ** 2)


def own_step(state, x):
    p, opt_state = state
    value, grads = jax.value_and_grad(loss)(p, x)
    updates, opt_state = TX.update(grads, opt_state, p)
    return (optax.apply_updates(p, updates), opt_state), value


def mesh_named(*names):
    return Mesh(np.asarray(jax.devices()).reshape(8, *[1] * (len(names) - 1)), names)


def shard(fn=own_step, **options):
    return lambda: jzero.shard(fn, **{"stage": 3, **options})


def train_step(fn=loss, tx=TX, **options):
    return lambda: jzero.make_train_step(fn, tx, **options)


def places(state, **options):
    """The roles and specs of a state; shapes are enough."""
    return lambda: jzero.shard(own_step, **{"stage": 3, **options}).shardings(state)


def runs(fn=own_step, *, rows=ROWS, **options):
    """One call of a step of the user's own on arrays that are there before."""
    step = jzero.shard(fn, stage=3, **options)
    state, x = (params(), TX.init(params())), jnp.ones(rows)
    return lambda: step(state, x)


def trains(fn=loss, *, batch=None, stage=3, **options):
    """One call of jzero's own step."""
    own = jzero.make_train_step(fn, TX, **options)
    step, state, batch = jzero.shard(own, stage=stage), own.init(params()), jnp.ones(ROWS) if batch is None else batch
    return lambda: step(state, batch)


def on_one_device(**options):
    own = jzero.make_train_step(loss, TX, **options)
    state, x = own.init(params()), jnp.ones(ROWS)
    return lambda: own(state, x)


def other_shapes(state, x):
    (p, opt_state), value = own_step(state, x)
    return ({"w": p["w"].astype(jnp.bfloat16), "b": p["b"][:16]}, opt_state), value


def lost_leaf(state, x):
    (p, opt_state), value = own_step(state, x)
    return ({"w": p["w"], "extra": p["b"]}, opt_state), value


def prints_in_order(p, x):
    jax.debug.print("{x}", x=x[0, 0], ordered=True)
    return loss(p, x)


def elsewhere():
    step = jzero.shard(own_step, stage=3)
    four = jzero.shard(own_step, stage=3, mesh=jzero.make_mesh(devices=jax.devices()[:4]))
    state, x = four.place((params(), TX.init(params()))), jnp.ones(ROWS)
    return lambda: step(state, x)


SPEC = PartitionSpec("data")
TABLE: dict[str, Callable[[], Bad]] = {
    # stages, policies, names
    "stage": lambda: Bad(shard(stage=4), ValueError, "stage must be one of 0, 1, 2, 3", ("stage=4",), "Write stage=3"),
    "stage as text": lambda: Bad(shard(stage="3"), ValueError, "stage must be one of", ("stage='3'",), "Write stage=3"),
    "stage as bool": lambda: Bad(shard(stage=True), ValueError, "stage must be one of", ("stage=True",), "Write stage=3"),
    "precision": lambda: Bad(
        train_step(precision="bf61"), ValueError, "unknown precision", ("precision='bf61'",), "Name a preset",
        "Did you mean 'bf16'? Known: fp32, bf16, fp16, bf16-pure", who=MAKE,
    ),
    "precision dtype": lambda: Bad(
        train_step(precision=jzero.PrecisionPolicy(compute=jnp.int8)), TypeError, "floating-point dtype", ("compute=",),
        "jnp.bfloat16", who="jzero.PrecisionPolicy",
    ),
    "remat policy": lambda: Bad(
        shard(jzero.make_train_step(loss, TX), remat="dot"), ValueError, "unknown remat", ("remat='dot'",),
        "jax.checkpoint_policies", "Did you mean 'dots'? Known: none, full, dots",
    ),
    "reduction": lambda: Bad(
        train_step(reduction="globl"), ValueError, "unknown reduction", ("reduction='globl'",), "Did you mean 'global'?",
        who=MAKE,
    ),
    "on_indivisible": lambda: Bad(
        shard(on_indivisible="err"), ValueError, "'replicate' or 'error'", ("on_indivisible='err'",), "Did you mean 'error'?"
    ),
    "min_shard_elements": lambda: Bad(
        shard(min_shard_elements=-1), ValueError, "a whole number, 0 or larger", ("min_shard_elements=-1",), "the default",
    ),
    # meshes
    "axis of make_mesh": lambda: Bad(
        lambda: jzero.make_mesh(dta=8), TypeError, "1 unknown axes", ("dta=8: Did you mean 'data'?",), "jax.sharding.Mesh",
        who=MESH,
    ),
    "mesh that does not fit": lambda: Bad(
        lambda: jzero.make_mesh(data=3, tensor=2), ValueError, "multiply to 6, which does not fit 8 devices",
        ("data     3", "tensor   2"), "write data=4", "make_mesh(data=3, tensor=2); 8 devices", who=MESH,
    ),
    "mesh without data": lambda: Bad(
        shard(mesh=mesh_named("batch")), ValueError, "no 'data' axis", ("'batch': Known: replica, data",),
        "jzero.make_mesh(data=8)", "mesh {'batch': 8}",
    ),
    "misspelt axis of a mesh": lambda: Bad(
        shard(mesh=mesh_named("data", "tensr")), ValueError, "unknown axis", ("'tensr': Did you mean 'tensor'?",),
        "jzero.make_mesh(data=8)", "mesh {'data': 8, 'tensr': 1}",
    ),
    "Explicit axes": lambda: Bad(
        shard(mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))), ValueError,
        "every mesh axis must be Auto", ("'data' is Explicit",), "Write jzero.make_mesh(data=8)", "mesh {'data': 8}",
    ),
    "mesh that is none": lambda: Bad(shard(mesh=8), TypeError, "takes a jax.sharding.Mesh", ("mesh=8",), "jzero.make_mesh"),
    # batches
    "batch": lambda: Bad(
        runs(rows=(12, 64)), ValueError, "8 equal parts (data 8)", ("float32[12,64]   dim 0 has size 12, not a multiple of 8",),
        "a batch of 8 or 16, or batch, mask = jzero.pad_batch(batch, 8)", "mesh {'data': 8}",
    ),
    "batch and accumulate": lambda: Bad(
        trains(accumulate=3), ValueError, "24 equal parts (data 8 x accumulate 3)", ("float32[16,64]   dim 0 has size 16",),
        "a batch of 24, or batch, mask = jzero.pad_batch(batch, 24)", "mesh {'data': 8}",
    ),
    "batch and accumulate on one device": lambda: Bad(
        on_one_device(accumulate=3), ValueError, "accumulate=3 microbatches", ("16 rows",),
        "15, 18; or batch, mask = jzero.pad_batch(batch, 3)", who=MAKE,
    ),
    "batches of two sizes": lambda: Bad(
        trains(lambda p, b: loss(p, b["x"]), batch={"x": np.ones(ROWS, "f4"), "y": np.ones(8, "f4")}), ValueError,
        "disagree on the number of examples", ("0/x   16 rows", "0/y   8 rows"), "Dim 0", who=MAKE,
    ),
    "empty batch": lambda: Bad(
        trains(batch=np.ones((0, 64), "f4")), ValueError, "the batch does not divide", ("0 rows",), "pad_batch", who=MAKE
    ),
    "pad_batch": lambda: Bad(
        lambda: jzero.pad_batch({"x": np.ones(3)}, 0), ValueError, "a positive integer", ("multiple=0",), "accumulate",
        who="jzero.pad_batch",
    ),
    # what a step returns
    "another structure": lambda: Bad(
        runs(lost_leaf), TypeError, "a state of another structure",
        ("0/b   float32[32] came in and did not come out", "0/extra   float32[32] came out and was not in"),
        "Return (state, aux) with a state of the structure that came in",
    ),
    "other containers": lambda: Bad(
        runs(lambda state, x: (list(state), 0.0)), TypeError, "a state of another structure",
        ("in:  PyTreeDef((", "out: PyTreeDef(["), "Return (state, aux)",
    ),
    "other shapes and dtypes": lambda: Bad(
        runs(other_shapes), TypeError, "changes 2 leaves of its state",
        ("0/b   in float32[32], out float32[16]", "0/w   in float32[64,32], out bfloat16[64,32]"), "Cast the leaf back",
    ),
    "no pair": lambda: Bad(
        runs(lambda state, x: (*state, x)), TypeError, "must return (state, aux)", ("got a tuple of 3",), "return None as aux"
    ),
    "no tuple": lambda: Bad(
        runs(lambda state, x: x), TypeError, "must return (state, aux)", ("got ShapeDtypeStruct",), "return None as aux"
    ),
    # states
    "roles": lambda: Bad(
        places({"x": params(), "y": params(), "tx": TX.init(params())}), ValueError, "cannot tell which leaves are the param",
        ("state['x']   2 leaves", "state['y']   2 leaves"), "params=lambda state: state['x'])", "x/w            float32[64,32]",
    ),
    "params= that fails": lambda: Bad(
        places((params(),), params=lambda state: state["net"]), ValueError, "params= raised TypeError", (), "Return a subtree",
        "0/w   float32[64,32]",
    ),
    "params= that is no function": lambda: Bad(
        shard(params="model"), TypeError, "a function of the state", ("params='model'",), 'params=lambda state: state["model"]'
    ),
    "rule that matches nothing": lambda: Bad(
        places((params(),), rules=[("kernel", SPEC), ("w", SPEC)]), ValueError, "1 of 2 patterns match nothing",
        ("'kernel'   matches no leaf",), "Correct the pattern", "paths: 0/b, 0/w",
    ),
    "rule with an unknown axis": lambda: Bad(
        places((params(),), rules=[("w", PartitionSpec("tensr"))]), ValueError, "1 leaves cannot take the spec",
        ("0/w   float32[64,32]   rule 'w': P('tensr',)   unknown axis 'tensr'. Did you mean 'tensor'?",), "axes of the mesh",
        "mesh {'data': 8}",
    ),
    "rule that does not divide": lambda: Bad(
        places({"params": jnp.ones((12, 64))}, rules=[("params", SPEC)]), ValueError, "1 leaves cannot take the spec",
        ("float32[12,64]", "dim 0 has size 12, not a multiple of 8"), "whose sizes divide the dim", "mesh {'data': 8}",
    ),
    "rule that is none": lambda: Bad(
        places((params(),), rules=["w"]), TypeError, "a rule is a pair (pattern, PartitionSpec)", ("'w'",), "Write rules=["
    ),
    "rules that are no list": lambda: Bad(shard(rules=3), TypeError, "a list of rules", ("rules=3",), "Write rules=["),
    "indivisible": lambda: Bad(
        places((jnp.ones((50, 50)), TX.init(jnp.ones((50, 50)))), on_indivisible="error"), ValueError,
        "2 of 2 leaves cannot be split over axis 'data' (size 8)", ("float32[50,50]   dim 0 has size 50, dim 1 has size 50",),
        "Pad dim 1 of 0 to 56", "mesh {'data': 8}",
    ),
    "state on another mesh": lambda: Bad(
        elsewhere(), ValueError, "4 of 4 state leaves are not where this step keeps them",
        ("0/w           float32[64,32]   P('data',) on mesh {'data': 4}   expected P('data',) on mesh {'data': 8}",),
        "state = step.place(state)", "mesh {'data': 8}; stage 3",
    ),
    "state of another step": lambda: Bad(
        lambda: jzero.shard(jzero.make_train_step(loss, TX), stage=3).shardings((params(),)), TypeError, "must be a TrainState",
        ("got tuple",), "step.init(train_step.init, make_params, ...)",
    ),
    # losses and jzero's own step
    "loss that is no scalar": lambda: Bad(
        trains(lambda p, x: (x @ p["w"])[:, 0]), ValueError, "the loss must be a floating-point scalar", ("float32[2]",),
        "jnp.mean", who=MAKE,
    ),
    "loss that is an integer": lambda: Bad(
        trains(lambda p, x: jnp.sum(x @ p["w"] > 0)), ValueError, "the loss must be a floating-point scalar", ("int32[]",),
        "jzero.weighted(sum, weight)", who=MAKE,
    ),
    "loss that is nothing": lambda: Bad(
        trains(lambda p, x: None), TypeError, "the loss must be a scalar array", ("got NoneType",), "Return a scalar", who=MAKE
    ),
    "loss with aux": lambda: Bad(
        trains(lambda p, x: (loss(p, x), {})), TypeError, "the loss returned a tuple", ("2 values",), "has_aux=True", who=MAKE
    ),
    "aux without a batch dim": lambda: Bad(
        trains(lambda p, x: (loss(p, x), {"mean": x.mean(0)}), has_aux=True), ValueError,
        "must keep the batch dim (16 rows here)", ("aux mean   float32[64]",), "jzero.summed(x)", who=MAKE,
    ),
    "accumulate": lambda: Bad(
        train_step(accumulate=0), ValueError, "a positive integer", ("accumulate=0",), "accumulate=1 is one", who=MAKE
    ),
    "clip_norm": lambda: Bad(
        train_step(clip_norm=-1.0), ValueError, "must be positive", ("clip_norm=-1.0",), "clip_norm=None does not", who=MAKE
    ),
    "fp16 that does not skip": lambda: Bad(
        train_step(precision="fp16", skip_nonfinite=False), ValueError, "fp16 lives by skipping overflows",
        ("skip_nonfinite=False", "compute=float16"), "Use bf16", who=MAKE,
    ),
    "optimizer": lambda: Bad(
        train_step(tx=optax.adam), TypeError, "an optax GradientTransformation", ("got function",), "optax.adamw(3e-4)",
        who=MAKE,
    ),
    "loss_fn": lambda: Bad(
        train_step(3), TypeError, "loss_fn must be callable", ("got int",), "loss_fn(params, *batch)", who=MAKE
    ),
    "nothing trains": lambda: Bad(
        lambda: jzero.make_train_step(loss, TX, trainable=lambda path: False).init(params()), ValueError,
        "no parameter is trainable", ("2 leaves, 2 of them floating point",), "path -> bool", who=MAKE,
    ),
    "trainable of another tree": lambda: Bad(
        lambda: jzero.make_train_step(loss, TX, trainable={"w": True}).init(params()), ValueError, "not a pytree like params",
        ("params:    PyTreeDef({'b': *, 'w': *})", "trainable: PyTreeDef({'w': *})"), "path -> bool", who=MAKE,
    ),
    "extra arguments of init": lambda: Bad(
        lambda: jzero.make_train_step(loss, TX).init(params(), 1), TypeError, "need a function", ("1 extra",),
        "train_step.init(make_params, *args)", who="TrainStep.init",
    ),
    # what does not exist (yet), or not here
    "ordered effects, composed": lambda: Bad(
        trains(prints_in_order), NotImplementedError, "ordered effects cannot run on 8 devices", ("OrderedDebug",),
        "ordered=False", "mesh {'data': 8}; stage 3",
    ),
    "ordered effects, opaque": lambda: Bad(
        runs(lambda state, x: (state, prints_in_order(state[0], x))), NotImplementedError, "cannot run on 8 devices",
        ("OrderedDebug",), "ordered=False", "mesh {'data': 8}; stage 3",
    ),
    "remat of a step": lambda: Bad(
        shard(remat="dots"), ValueError, "remat= would have no effect", ("remat='dots' with a step",), "jax.checkpoint"
    ),
    "schedule": lambda: Bad(
        shard(schedule="1f1b"), TypeError, "a schedule is for a step of a jzero.Pipeline", ("schedule='1f1b'",), "jzero.make"
    ),
    "no step": lambda: Bad(shard(3), TypeError, "a step is callable", ("got int",), "fn(state, *batch) -> (state, aux)"),
    "sharded twice": lambda: Bad(
        shard(jzero.shard(own_step, stage=1)), TypeError, "already sharded", ("ShardedStep(own_step, stage=1",), "step.fn"
    ),
}  # fmt: skip
