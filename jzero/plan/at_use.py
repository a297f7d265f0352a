"""Parameters that come at their uses and gradients that leave as they appear (`Offload(fetch="use")`): which, and how much.

The engine reads off the loss's program what is used once and as it comes (`jzero/gather/away.py`); here it is said of the
models. A tied table is used twice. Norms and routers are cast to float32 on the way, where the computation has another dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jzero import precision as precisions
from jzero import stages
from jzero._errors import explain
from jzero.offload.asked import HOST, USE
from jzero.plan import facts
from jzero.plan.names import WHO, said_of
from jzero.plan.shapes import MIN_SHARD_ELEMENTS, Leaf, Zero, is_tied, leaves
from jzero.plan.sizes import BATCH_AXES

_IN_FLOAT32 = ("ln_", "attn_norm", "mlp_norm", "norm", "router")
_KEPT = "lm_head"  # the program's last use: what came for the forward pass is there for the backward pass
_TABLE = "wte"
_LOOKED_UP = (_TABLE, "wpe")  # their gradients ask for no values


class Uses(NamedTuple):
    """What comes and goes while the gradient is computed, per device and step; `grads`: what is in host memory afterwards."""

    leaves: frozenset[int] = frozenset()
    comes: int = 0  # parameters, and with several microbatches the sums so far
    left: int = 0
    grads: int = 0
    copies: int = 0  # of `grads` in host memory at a time: a new sum is made beside the old one


def refusal(job: Any) -> Exception | None:
    """Why the engine would not do what a job asks for, or None."""
    if job.offload is None or job.offload.fetch != USE:
        return None
    asked, policy = said_of(job.offload), precisions.get(job.precision)
    if stages.get(job.stage).gather != "use":
        fix = "Write --stage 3, on one device too, or leave fetch= out."
        found = [f"{asked} at stage {job.stage}"]
        return ValueError(explain(WHO, "only stage 3 wants parameters at their uses", found=found, fix=fix))
    if job.pipe > 1:
        found, fix = [f"{asked} with pipe={job.pipe}"], "Leave pipe out of the mesh, or fetch= out."
        return NotImplementedError(explain(WHO, "a pipeline fetches its parameters once a step", found=found, fix=fix))
    rests, adds_up = (jnp.dtype(one).name for one in (policy.param, policy.accumulate))
    if rests != adds_up:
        found = [f"{job.precision}: parameters rest in {rests}, gradients add up in {adds_up}"]
        fix = "Write --precision bf16 (float32 at rest), or leave fetch= out."
        problem = "with fetch=use gradients have the dtype of the parameters that rest in host memory"
        return NotImplementedError(explain(WHO, problem, found=found, fix=fix))
    if not any(_can_come(job, leaf) for leaf in leaves(job.config, job.tensor, job.expert)):
        found = [", ".join(f"{axis}={size}" for axis, size in job.mesh.items())]
        fix = "Leave fetch= out, or give the devices of replica to data."
        problem = "fetch=use would have no effect: every parameter is whole on several devices, which add up its gradient"
        return ValueError(explain(WHO, problem, found=found, fix=fix))
    return None


def candidates(job: Any, found: tuple[Leaf, ...], going: dict[int, int]) -> frozenset[int]:
    """The parameters that rest in host memory and are not small: what the engine cuts buckets for, before it knows a batch."""
    place = job.offload.place_of("params")
    if job.offload.fetch != USE or place is None or place.kind != HOST:
        return frozenset()
    return frozenset(index for index, leaf in enumerate(found) if index in going and _is_large(leaf))


def uses(job: Any, found: tuple[Leaf, ...], going: dict[int, int], grads: Sequence[int]) -> Uses:
    """Of those the ones that come at their uses. `going`, `grads`: bytes of a leaf's shard at rest, and of its gradient."""
    coming = frozenset(index for index in candidates(job, found, going) if _can_come(job, found[index]))
    k = job.accumulate
    params = sum(going[index] * (1 if found[index].name in (_KEPT, *_LOOKED_UP) else 2) for index in coming)
    each = sum(grads[index] for index in coming)
    return Uses(coming, k * (params + (each if k > 1 else 0)), k * each, each, min(k, 2))


def _is_large(leaf: Leaf) -> bool:
    return leaf.size * leaf.num_pieces * leaf.num_groups * leaf.repeats >= MIN_SHARD_ELEMENTS


def _can_come(job: Any, leaf: Leaf) -> bool:
    """Used once and as it comes, and its gradient has not to be added up any more once it has been reduced."""
    if not _is_large(leaf) or leaf.is_experts or is_tied(leaf, job.config):
        return False
    if leaf.name.startswith(_IN_FLOAT32) and jnp.dtype(precisions.get(job.precision).compute) != jnp.float32:
        return False
    split = leaf.split(job.zero)
    return all(axis in split.axes for axis in BATCH_AXES if job.mesh.get(axis, 1) > 1)


def moments(
    job: Any, found: tuple[Leaf, ...], coming: frozenset[int], before: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """The moments of a step with what is on its way then: one layer's slices of parameters, of gradients as they leave, and of
    the sums so far, which loops over layers hold from before they begin until they end; and the tables outside.

    Read off programs that the TPU compiler made. It starts a copy as soon as nothing hinders: tables come together when a
    microbatch begins, the head's own sum with them, and its gradient is the last to go.
    """
    if not coming:
        return before
    policy = precisions.get(job.precision)
    rest, compute = jnp.dtype(policy.param).itemsize, jnp.dtype(policy.compute).itemsize
    shard = lambda leaf: rest * leaf.size // leaf.split(job.zero).pieces
    tables = {found[index].name: found[index] for index in coming if found[index].name in (_TABLE, _KEPT)}
    came = {name: shard(tables[name]) if name in tables else 0 for name in (_TABLE, _KEPT)}
    is_apart = job.zero != Zero() or not facts.is_tpu(job.parsed)  # else products take what came, and give out what leaves
    cast = {name: compute * tables[name].size if name in tables and is_apart else 0 for name in came}
    layer = sum(shard(found[index]) for index in coming if found[index].is_layer)
    again = 2 if job.accumulate > 1 else 1
    slices = {"slices of parameters": layer, "slices of gradients": again * layer}
    of_layer = compute * sum(leaf.size for leaf in found if leaf.is_layer)
    during = {name: one | slices for name, one in before.items() if name != "update"}
    waits = "logits" in during["backward"]
    head = {"head as it came": came[_KEPT], "head's gradient leaving": came[_KEPT]}
    if _KEPT in tables:
        head |= {"head gathered": cast[_KEPT], "gradient of the head": cast[_KEPT]}
        for name in during.keys() - {"head"}:
            during[name] |= {} if waits else {"gradient of the head": cast[_KEPT], "head's gradient leaving": came[_KEPT]}
    if job.zero != Zero():
        head["one layer's gradients"] = of_layer  # the loop's first are made beside the head's
    elif is_apart:
        for name in during.keys() - {"head"}:
            during[name]["gathered parameters"] = of_layer  # cast, not gathered
    during["head"] |= head
    if _TABLE not in tables:
        return before | during
    always = {name: before["head"][name] for name in ("working copy", "sum of gradients", "saved activations")}
    start = {
        "tables as they came": came[_TABLE] + again * came[_KEPT],
        "embedding gathered": compute * tables[_TABLE].size,
    }
    end = {"gradient of the embedding": cast[_TABLE], "tables' gradients leaving": came[_TABLE] + came[_KEPT]}
    end |= {"logits": before["head"]["logits"]} if waits else {}
    return before | during | {"start": always | start, "end": always | end}
