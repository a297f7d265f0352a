"""Mistakes with `jzero.Offload`: `TABLE`, as in mistakes.py."""

from collections.abc import Callable

import jax
import numpy as np
import optax
from mistakes import TX, Bad, loss, params, shard
from optax import contrib

import jzero

OFFLOAD = "jzero.Offload"
HOST, AT_USE = jzero.Offload(opt_state="host"), jzero.Offload(params="host", fetch="use")


def offloads(tx, **options):
    """A state placed by a step that keeps its optimizer's arrays in host memory."""
    own = jzero.make_train_step(loss, tx)
    step, state = jzero.shard(own, stage=3, offload=jzero.Offload(opt_state="host", **options)), own.init(params())
    return lambda: step.place(state)


def cut_step(norm_of, *, by_all=False):
    """A call of a step that makes its own update, momentum, and returns a norm; `by_all`: one norm scales all moments."""

    def own_step(state, x):
        p, moments = state["params"], state["momentum"]
        grads = jax.grad(loss)(p, x)
        moments = jax.tree.map(lambda moment, grad: 0.9 * moment + grad, moments, grads)
        scale = 1e-3 / optax.tree.norm(moments) if by_all else 1e-3
        new = {"params": jax.tree.map(lambda leaf, moment: leaf - scale * moment, p, moments), "momentum": moments}
        return new, {"norm": norm_of(grads, moments)}

    step = jzero.shard(own_step, stage=3, offload=HOST)
    shapes = {
        role: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params())
        for role in ("params", "momentum")
    }
    return lambda: step.report(shapes, jax.ShapeDtypeStruct((16, 64), np.float32))


TABLE: dict[str, Callable[[], Bad]] = {
    "offload by name": lambda: Bad(
        shard(offload="host"), TypeError, "offload= is a jzero.Offload", ("offload='host'",), 'jzero.Offload(opt_state="host")'
    ),
    "activations of a step that makes its own update": lambda: Bad(
        shard(offload=jzero.Offload(activations="host")), NotImplementedError, "only a TrainStep's activations",
        ("Offload(activations='host')",), 'Offload(opt_state="host")', "in host memory",
    ),
    "uses of a step that makes its own update": lambda: Bad(
        shard(offload=AT_USE), NotImplementedError, "only a TrainStep's parameters come at their uses", ("fetch='use'",),
        "make_train_step", "fetched once a step",
    ),
    "files for a step that makes its own update": lambda: Bad(
        shard(offload=jzero.Offload(opt_state="nvme:/x")), NotImplementedError, "only a TrainStep's state can rest in files",
        ("opt_state='nvme:/x'",), "make_train_step", "in host memory",
    ),
    "a step that returns what it makes of moments": lambda: Bad(
        cut_step(lambda grads, moments: optax.tree.norm(moments)), ValueError, "1 of the values that the step returns",
        ("aux['norm']", "(tree_norm)"), "keep opt_state on the device", "a bucket of leaves", who=OFFLOAD,
    ),
    "a step that prints moments": lambda: Bad(
        cut_step(lambda grads, moments: jax.debug.print("{}", moments["b"][0])), ValueError, "prints or calls back",
        ("debug_", "mistakes_offload.py"), "after the step", "a program of its own", who=OFFLOAD,
    ),
    "a step whose moments meet": lambda: Bad(
        cut_step(lambda grads, moments: optax.tree.norm(grads), by_all=True), ValueError, "is not leaf by leaf",
        ("2 parameters (params/b, params/w) meet", "tree_sum"), "keep opt_state on the device", "each bucket", who=OFFLOAD,
    ),
    "offload of nothing": lambda: Bad(
        jzero.Offload, ValueError, "nothing is offloaded", ("are None",), 'Offload(opt_state="host")', who=OFFLOAD
    ),
    "offload to nowhere": lambda: Bad(
        lambda: jzero.Offload(opt_state="hots"), ValueError, "opt_state= names no place", ("opt_state='hots'",), "nvme:/data",
        "Did you mean 'host'?", who=OFFLOAD,
    ),
    "offload to a number": lambda: Bad(
        lambda: jzero.Offload(params=1), TypeError, "params= is a place's name", ("params=1",), '"host"', who=OFFLOAD
    ),
    "offload to no folder": lambda: Bad(
        lambda: jzero.Offload(opt_state="nvme:"), ValueError, "names no folder", ("'nvme:'",), "nvme:/data/swap", who=OFFLOAD
    ),
    "activations on a disk": lambda: Bad(
        lambda: jzero.Offload(activations="nvme:/x"), ValueError, "host memory alone", ("activations='nvme:/x'",),
        'activations="host"', who=OFFLOAD,
    ),
    **{
        f"fraction {fraction}": lambda fraction=fraction: Bad(
            lambda: jzero.Offload(opt_state="host", fraction=fraction), ValueError, "above 0 and at most 1",
            (f"fraction={fraction}",), "keeps a fifth", who=OFFLOAD,
        )
        for fraction in (0, -0.1, 1.1, float("nan"), True)
    },
    "bucket of nothing": lambda: Bad(
        lambda: jzero.Offload(opt_state="host", bucket_bytes=0), ValueError, "positive whole number", ("bucket_bytes=0",),
        "256 * 2**20", who=OFFLOAD,
    ),
    "fraction without effect": lambda: Bad(
        lambda: jzero.Offload(activations="host", fraction=0.5), ValueError, "no effect", ("fraction=0.5",), "params=",
        who=OFFLOAD,
    ),
    "update where nothing is": lambda: Bad(
        lambda: jzero.Offload(opt_state="host", update="hst"), ValueError, "update= is 'device', 'host' or 'auto'",
        ("update='hst'",), 'update="auto"', "Did you mean 'host'?", who=OFFLOAD,
    ),
    "update without effect": lambda: Bad(
        lambda: jzero.Offload(activations="host", update="host"), ValueError, "no effect", ("update='host'",), "params=",
        who=OFFLOAD,
    ),
    "update on the host of what needs whole leaves": lambda: Bad(
        offloads(contrib.muon(1e-3), update="host"), ValueError, "of 2 parameters' updates cannot be computed on the host",
        ("params/w", "is not elementwise"), "update='auto'", "pieces alone", who=OFFLOAD,
    ),
    "update on the host of what rests in files": lambda: Bad(
        shard(jzero.make_train_step(loss, TX), offload=jzero.Offload(params="nvme:/x", update="host")), NotImplementedError,
        "the host does not update parameters that rest in files", ("update='host'",), "params='host'", "brought to the device",
    ),
    "fetch at no time": lambda: Bad(
        lambda: jzero.Offload(params="host", fetch="used"), ValueError, "fetch= is 'step' or 'use'", ("fetch='used'",),
        'fetch="use"', "Did you mean 'use'?", who=OFFLOAD,
    ),
    "fetch of what is there": lambda: Bad(
        lambda: jzero.Offload(opt_state="host", fetch="use"), ValueError, "parameters in host memory", ("params=None",),
        'params="host"', who=OFFLOAD,
    ),
    "fetch at uses that are none": lambda: Bad(
        shard(jzero.make_train_step(loss, TX), stage=1, offload=AT_USE), ValueError, "only stage 3 wants", ("stage 1",),
        "stage=3",
    ),
    "gradients in another dtype": lambda: Bad(
        shard(jzero.make_train_step(loss, TX, precision="bf16-pure"), offload=AT_USE), NotImplementedError,
        "the dtype of the parameters that rest", ("rest in bfloat16", "float32"), "precision='bf16'",
    ),
    "an optimizer that waits for gradients that left": lambda: Bad(
        offloads(optax.chain(optax.clip_by_global_norm(1.0), TX), params="host", fetch="use"), NotImplementedError,
        "no update may wait for all gradients", ("params/w",), "clip_norm=", "in host memory", who=OFFLOAD,
    ),
    "activations under a policy that saves nothing": lambda: Bad(
        shard(jzero.make_train_step(loss, TX), remat="full", offload=jzero.Offload(activations="host")), ValueError,
        "activations= would have no effect", ("remat='full'",), "remat='dots'", "remat policy's choice",
    ),
    "offload of activations without a name": lambda: Bad(
        shard(jzero.make_train_step(loss, TX), remat="offload:"), ValueError, "names nothing to offload", ("'offload:'",),
        "offload:hidden",
    ),
    "offload of an optimizer without arrays": lambda: Bad(
        offloads(optax.sgd(0.1)), ValueError, "opt_state= would have no effect",
        ("no arrays of this role",), "Leave opt_state= out", who=OFFLOAD,
    ),
    "offload of an update that looks at all leaves": lambda: Bad(
        offloads(optax.chain(TX, optax.clip_by_global_norm(1.0))), ValueError,
        "not leaf by leaf", ("2 parameters (params/b, params/w) meet",), "clip gradients, not updates", "each bucket",
        who=OFFLOAD,
    ),
}  # fmt: skip
