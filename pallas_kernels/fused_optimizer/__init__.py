"""AdamW and Lion in one pass over memory: unscale, clip, moments in 32, 16 or 8 bits, decay, the parameter and a copy of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import blocks, rounding
from pallas_kernels._errors import explain, short
from pallas_kernels.dispatch import Call, Implementation, Op
from pallas_kernels.fused_optimizer import body, buckets, gpu, reference, tpu
from pallas_kernels.fused_optimizer.buckets import BELOW
from pallas_kernels.fused_optimizer.call import How
from pallas_kernels.fused_optimizer.rules import RULES
from pallas_kernels.quantize.cut import num_blocks

_FLOATS = ("float32", "bfloat16", "float16")


def _fits(rule: str, call: Call) -> str | None:
    """Rows of whole blocks; moments in 8 bits along the last dim."""
    how, num_moments = How(**call.options), RULES[rule].num_moments
    param, grad, *moments = call.arrays[: 2 + num_moments]
    has_scales = moments[0].dtype == jnp.uint8
    length = body.row_length(param.shape, has_scales=has_scales)
    if length is None:
        return f"a leaf of {short(param)} is no whole number of blocks of 128: put it into a bucket"
    if has_scales and how.dim != param.ndim - 1:
        return f"blocks of moments must run along the last dim, these run along dim {how.dim} of {param.ndim}"
    block = how.block if has_scales else body.block_of(length) or 0
    return blocks.why_not(block, block, length, [array.dtype for array in (param, grad, *moments)])


def _is_split(call: Call) -> str | None:
    """Under Auto axes a compiler that knows nothing of a kernel brings all of its operands together first."""
    return None if call.is_local else "its arrays may be split over devices, and it would gather them: call it in shard_map"


def _op(rule: str) -> Op:
    fits = partial(_fits, rule)
    return Op(
        f"fused_{rule}",
        [
            Implementation("mosaic_gpu", partial(gpu.update, rule), fits, platform="gpu", loses=_is_split),
            Implementation("mosaic_tpu", partial(tpu.update, rule), fits, platform="tpu", loses=_is_split),
            Implementation("reference", partial(reference.update, rule)),
        ],
    )


ADAMW, LION = _op("adamw"), _op("lion")


class Leaf(NamedTuple):
    """A parameter, its gradient and what the optimizer keeps for it.

    moments: float32, bfloat16, or uint8 as `quantize` makes them ("dynamic", AdamW's second "dynamic_unsigned").
    scales: of moments in uint8, in blocks of `block` along `dim`. decays: whether weight decay applies.
    """

    param: Any
    grad: Any
    moments: tuple[Any, ...]
    scales: tuple[Any, ...] = ()
    dim: int = -1
    block: int = 256
    decays: bool = True


class Updated(NamedTuple):
    """value: the update to add, or the new parameter. copy: the new parameter in another dtype, or None."""

    value: Any
    moments: tuple[Any, ...]
    scales: tuple[Any, ...]
    copy: Any


def adamw(
    leaves: Sequence[Leaf], *, rate: Any, count: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, eps_root: Any = 0.0,
    decay: Any = 1e-4, factor: Any = 1.0, seed: Any = 0, returns: str = "updates", copy: Any = None, bucket_below: int = BELOW,
    implementation: str | None = None,
) -> list[Updated]:  # fmt: skip
    """AdamW of many leaves, each element of which is read once and written once.

        g = factor grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        update = -rate ((m / (1 - b1^count)) / (sqrt(v / (1 - b2^count) + eps_root) + eps) + decay param)

    Arithmetic is float32's (float64 stays). What is stored in bfloat16 (moments, a parameter, the copy) is rounded
    stochastically by `seed`, `count`, the leaf's index and the element's place in the leaf (in its bucket, for a kernel), so
    that its mean is kept; moments in 8 bits go to the nearest value of their map. 28 bytes a parameter with float32 throughout.

    Kernels take leaves below `bucket_below` elements (and those that are no whole number of blocks) side by side in one array,
    so that a model of hundreds of small leaves takes a few launches; the reference takes leaf by leaf, which moves nothing and
    lets XLA split each as it lies. Where arrays may be split over devices kernels are not chosen: they would be gathered.

    Args:
      leaves: float parameters and gradients of one shape each.
      rate, decay, factor, b1, ...: Python numbers or float scalars of the program. factor: what unscales and clips gradients.
      count: of this update, from 1.
      returns: "updates" (float32, to be added), or "params".
      copy: such as jnp.bfloat16: the new parameter a second time, for the next forward pass.
      bucket_below: elements; 0 takes every leaf by itself.
      implementation: "reference", "mosaic_gpu" or "mosaic_tpu" for all leaves.

    Raises:
      ValueError: shapes or moments that do not fit their parameter, an unknown implementation or `returns`.
      NotImplementedError: a named kernel that cannot take a leaf.

    Example:
      >>> w = jnp.ones((2, 2))
      >>> (one,) = adamw([Leaf(w, w, (0 * w, 0 * w))], rate=0.1, count=1, decay=0.0, returns="params")
      >>> print(one.value[0], one.moments[0][0])
      [0.9 0.9] [0.1 0.1]

    References:
      Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019. Dettmers et al.: 8-bit Optimizers, 2022.
    """
    numbers = {"rate": rate, "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "decay": decay, "factor": factor}
    numbers |= {"correction1": 1 - b1**count, "correction2": 1 - b2**count}
    return _update("adamw", ADAMW, leaves, numbers, count, seed, returns, copy, bucket_below, implementation)


def lion(
    leaves: Sequence[Leaf], *, rate: Any, count: Any, b1: Any = 0.9, b2: Any = 0.99, decay: Any = 1e-3, factor: Any = 1.0,
    seed: Any = 0, returns: str = "updates", copy: Any = None, bucket_below: int = BELOW, implementation: str | None = None,
) -> list[Updated]:  # fmt: skip
    """Lion of many leaves, as `adamw` otherwise; `count` only seeds the noise.

        g = factor grad,   update = -rate (sign(b1 m + (1 - b1) g) + decay param),   m = b2 m + (1 - b2) g

    Example:
      >>> w = jnp.ones((2, 2))
      >>> (one,) = lion([Leaf(w, -w, (0 * w,))], rate=0.1, count=1, decay=0.0)
      >>> print(one.value[0])
      [0.1 0.1]

    References:
      Chen et al.: Symbolic Discovery of Optimization Algorithms, 2023.
    """
    numbers = {"rate": rate, "b1": b1, "b2": b2, "decay": decay, "factor": factor}
    return _update("lion", LION, leaves, numbers, count, seed, returns, copy, bucket_below, implementation)


def _update(
    rule: str, op: Op, leaves: Sequence[Leaf], numbers: dict[str, Any], count: Any, seed: Any, returns: str, copy: Any,
    bucket_below: int, implementation: str | None,
) -> list[Updated]:  # fmt: skip
    _check(rule, leaves, returns)
    if not leaves:
        return []
    copy = None if copy is None else jnp.dtype(copy)
    program = {name: value for name, value in numbers.items() if not isinstance(value, int | float)}
    constants = {name: float(value) for name, value in numbers.items() if name not in program}

    def run(leaf: Leaf, index: int) -> tuple[Any, ...]:
        known = constants if leaf.decays else {**constants, "decay": 0.0}
        asked = {name: jnp.asarray(value) for name, value in program.items() if name not in known}
        dim = leaf.dim % leaf.param.ndim if leaf.param.ndim else 0
        options = How(returns, copy, tuple(sorted(known.items())), tuple(asked), dim, leaf.block)
        noisy = options.needs_noise(leaf.param, leaf.moments)
        seeds = [rounding.fold(seed, count, index)] if noisy else []
        arrays = (leaf.param, leaf.grad, *leaf.moments, *leaf.scales, *asked.values(), *seeds)
        return op(*arrays, implementation=implementation, **options._asdict())

    def takes_kernel(leaf: Leaf) -> bool:
        if implementation is not None:
            return op.table[implementation].platform is not None if implementation in op.table else False
        options = How(returns, copy, tuple(sorted(constants.items())), tuple(program), 0, leaf.block)
        return op.would_be(leaf.param, leaf.grad, *leaf.moments, **options._asdict()).platform is not None

    return [_unpacked(each, len(leaves[0].moments), copy) for each in buckets.run(leaves, run, takes_kernel, bucket_below)]


def _unpacked(found: Sequence[Any], num_moments: int, copy: Any) -> Updated:
    value, *rest = found
    last = rest.pop() if copy is not None else None
    return Updated(value, tuple(rest[:num_moments]), tuple(rest[num_moments:]), last)


def _check(rule: str, leaves: Sequence[Leaf], returns: str) -> None:
    """All leaves that do not fit, with what is wrong."""
    who = f"pallas_kernels.fused_optimizer.{rule}"
    if returns not in ("updates", "params"):
        fix = "'updates' are to be added, 'params' are the new ones."
        raise ValueError(explain(who, "no such result", found=[f"returns={returns!r}"], context="", fix=fix))
    problems = [f"leaf {index}: {why}" for index, leaf in enumerate(leaves) for why in _problems(leaf, RULES[rule].formats)]
    if problems:
        fix = "Gradients and moments have the parameter's shape; uint8 moments have scales as `quantize` makes them."
        raise ValueError(explain(who, "leaves do not fit together", found=problems, context=f"{len(leaves)} leaves", fix=fix))


def _problems(leaf: Leaf, formats: Sequence[str]) -> list[str]:
    shape, said = leaf.param.shape, f"param {short(leaf.param)}"
    wrong = [f"{said}, grad {short(leaf.grad)}"] if leaf.grad.shape != shape else []
    wrong += [
        f"{said} must be floating, grad {short(leaf.grad)} too"
        for one in (leaf.param, leaf.grad)
        if not jnp.issubdtype(one.dtype, jnp.floating)
    ]
    if len(leaf.moments) != len(formats):
        return [*wrong, f"{len(leaf.moments)} moments, it keeps {len(formats)}"]
    wrong += [f"{said}, moment {short(moment)}" for moment in leaf.moments if moment.shape != shape]
    in_bytes = [moment.dtype == jnp.uint8 for moment in leaf.moments]
    known = {*_FLOATS, "float64", "uint8"}
    wrong += [f"moment {short(moment)}" for moment in leaf.moments if str(moment.dtype) not in known]
    if any(in_bytes) != all(in_bytes) or len(leaf.scales) != (len(formats) if any(in_bytes) else 0):
        return [*wrong, f"moments {', '.join(map(short, leaf.moments))} with {len(leaf.scales)} scales"]
    if leaf.scales and shape:
        dim = leaf.dim % len(shape)
        wanted = tuple(num_blocks(size, leaf.block) if one == dim else size for one, size in enumerate(shape))
        wrong += [f"scales {short(scale)}, must be {list(wanted)}" for scale in leaf.scales if scale.shape != wanted]
    return wrong
