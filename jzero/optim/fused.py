"""`fused_adamw`, `fused_lion`: optax transformations whose update is one pass over memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jzero._errors import explain, suggest
from jzero._tree import is_float, num_elements
from jzero.optim import blocks
from pallas_kernels import fused_optimizer
from pallas_kernels.fused_optimizer.buckets import BELOW

MOMENTS = ("float32", "bfloat16", "8bit")
FORMATS = {"mu": True, "nu": False}  # name of a moment -> whether it has a sign
Rate = float | jax.Array | Callable[[jax.Array], jax.Array]


class FusedState(NamedTuple):
    """The number of updates, moments like the parameters, and for those in 8 bits their scales; Lion has no `nu`.

    As in `Moments8bitState`, scales have no names, so that rules about a parameter's name do not reach them.
    """

    count: jax.Array  # int32[]
    mu: Any
    nu: Any
    scales: tuple[jax.Array | None, ...]  # of mu's leaves, then nu's


class _Kind(NamedTuple):
    who: str
    names: tuple[str, ...]  # of its moments
    update: Callable[..., list[fused_optimizer.Updated]]


_ADAMW = _Kind("jzero.optim.fused_adamw", ("mu", "nu"), fused_optimizer.adamw)
_LION = _Kind("jzero.optim.fused_lion", ("mu",), fused_optimizer.lion)


def fused_adamw(
    learning_rate: Rate, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, eps_root: Any = 0.0, *, weight_decay: Any = 1e-4,
    mask: Any = None, moments: str = "float32", min_elements: int | None = None, seed: int = 0,
    bucket_below: int | None = None, implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """`optax.adamw`, the whole update of an element at once: unscale, clip, moments, bias, decay and rate.

        g = factor grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        update = -rate ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps) + weight_decay param)

    Element by element, so every stage, mesh, offload bucket and slice takes it as it takes `optax.adamw`, and nothing travels.
    Arithmetic and updates are float32's. Equal to optax.adamw to float32's rounding; `moments` replaces `moments_bf16` and
    `moments_8bit` around it, with the same numbers but for the noise.

    Args:
      learning_rate: a number or a schedule of the count.
      mask: a bool pytree like the parameters, or a function that makes one: where decay applies.
      moments: at rest "float32"; "bfloat16" (rounded stochastically); "8bit" (block-wise, `jzero.optim.blocks`).
      min_elements: with "8bit", smaller leaves keep float32 (default 4,096); with others an error: it would do nothing.
      seed: of the noise, which depends on it, the count, the leaf and the element's place; not on the mesh.
      implementation: of `pallas_kernels.fused_optimizer.adamw`: None chooses, and reports say which. A kernel is taken on one
        GPU or TPU, once it has run there; where arrays may be split, XLA's form leaf by leaf.
      bucket_below: leaves of fewer elements (default 65,536) share one launch of a kernel; 0 where the state is offloaded, leaf
        by leaf.

    Returns:
      A transformation; `update` takes `factor=` too: what gradients are multiplied by, to unscale and clip them in the same
      pass.

    Raises:
      ValueError: unknown `moments`, settings without effect, an update without parameters, a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones((2, 3))}
      >>> tx = fused_adamw(0.1)
      >>> updates, state = tx.update(params, tx.init(params), params, factor=0.5)
      >>> print(updates["w"][0, 0], state.mu["w"][0, 0])
      -0.10000934 0.05

    References:
      Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019.
    """
    numbers = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    run = {"seed": seed, "bucket_below": BELOW if bucket_below is None else bucket_below, "implementation": implementation}
    return _transformation(_ADAMW, learning_rate, weight_decay, numbers, mask, moments, min_elements, run)


def fused_lion(
    learning_rate: Rate, b1: Any = 0.9, b2: Any = 0.99, *, weight_decay: Any = 1e-3, mask: Any = None, moments: str = "float32",
    min_elements: int | None = None, seed: int = 0, bucket_below: int | None = None, implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """`optax.lion`, as `fused_adamw` is optax.adamw.

        g = factor grad,   update = -rate (sign(b1 m + (1 - b1) g) + weight_decay param),   m = b2 m + (1 - b2) g

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((2, 3))}
      >>> tx = fused_lion(0.1, weight_decay=0.0)
      >>> print(tx.update(params, tx.init(params), params)[0]["w"][0, 0])
      -0.1

    References:
      Chen et al.: Symbolic Discovery of Optimization Algorithms, 2023.
    """
    numbers = {"b1": b1, "b2": b2}
    run = {"seed": seed, "bucket_below": BELOW if bucket_below is None else bucket_below, "implementation": implementation}
    return _transformation(_LION, learning_rate, weight_decay, numbers, mask, moments, min_elements, run)


def _transformation(
    kind: _Kind, rate: Rate, decay: Any, numbers: dict[str, Any], mask: Any, moments: str, min_elements: int | None,
    run: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    _check(kind.who, moments, min_elements)

    def init(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        kept, scales, least = [], [], 4096 if min_elements is None else min_elements
        for name in kind.names:
            made = [_zeros(leaf, moments, least, name) for leaf in leaves]
            kept.append(jax.tree.unflatten(treedef, [values for values, _ in made]))
            scales += [scale for _, scale in made]
        return FusedState(jnp.zeros((), jnp.int32), kept[0], kept[1] if len(kept) > 1 else None, tuple(scales))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            fix = "Call tx.update(grads, state, params)."
            raise ValueError(explain(kind.who, "decay and rounding need the parameters", found=["params=None"], fix=fix))
        count = jnp.asarray(optax.safe_increment(state.count))
        treedef = jax.tree.structure(updates)
        leaves = _leaves(kind, updates, state, params, _decays(kind.who, mask, params))
        now = rate(state.count) if callable(rate) else rate
        found = kind.update(leaves, rate=now, count=count, decay=decay, factor=extra.get("factor", 1.0), **numbers, **run)
        trees = [jax.tree.unflatten(treedef, [one.moments[i] for one in found]) for i in range(len(kind.names))]
        scales = tuple(one.scales[i] if one.scales else None for i in range(len(kind.names)) for one in found)
        after = FusedState(count, trees[0], trees[1] if len(trees) > 1 else None, scales)
        return jax.tree.unflatten(treedef, [one.value for one in found]), after

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(leaf: Any, moments: str, min_elements: int, name: str) -> tuple[jax.Array, jax.Array | None]:
    """A moment at rest, and its scales. What is small or no matrix of numbers stays float32."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    if moments == "8bit" and num_elements(leaf) >= min_elements and leaf.ndim and is_float(leaf):
        return blocks.quantize(jnp.zeros(leaf.shape, wide), signed=FORMATS[name])
    return jnp.zeros(leaf.shape, jnp.bfloat16 if moments == "bfloat16" and leaf.ndim else wide), None


def _leaves(kind: _Kind, updates: Any, state: FusedState, params: Any, decays: list[bool]) -> list[fused_optimizer.Leaf]:
    grads, values = jax.tree.leaves(updates), jax.tree.leaves(params)
    kept = [jax.tree.leaves(getattr(state, name)) for name in kind.names]
    scales = [state.scales[i * len(values) : (i + 1) * len(values)] for i in range(len(kind.names))]
    leaves = []
    for index, (grad, param) in enumerate(zip(grads, values, strict=True)):
        own = tuple(each[index] for each in scales)
        cut = blocks.Shape.of(param.shape) if own[0] is not None else None
        leaf = fused_optimizer.Leaf(param, grad, tuple(each[index] for each in kept), decays=decays[index])
        leaves.append(leaf if cut is None else leaf._replace(scales=own, dim=cut.dim, block=cut.block))
    return leaves


def _decays(who: str, mask: Any, params: Any) -> list[bool]:
    """Per leaf: whether decay applies."""
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    found = mask(params) if callable(mask) else mask
    if jax.tree.structure(found) != jax.tree.structure(params):
        said = [f"params: {jax.tree.structure(params)}", f"mask:   {jax.tree.structure(found)}"]
        fix = "Pass a bool pytree like the parameters, or params -> such a tree."
        raise ValueError(explain(who, "mask= is not a pytree like params", found=said, fix=fix))
    return [bool(leaf) for leaf in jax.tree.leaves(found)]


def _check(who: str, moments: str, min_elements: int | None) -> None:
    if moments not in MOMENTS:
        found, fix = [f"moments={moments!r}"], "Name one of them."
        raise ValueError(explain(who, "no such moments", found=found, context=suggest(moments, MOMENTS), fix=fix))
    if moments != "8bit" and min_elements is not None:
        found, fix = [f"min_elements={min_elements} with moments={moments!r}"], "Leave it out, or pass moments='8bit'."
        raise ValueError(explain(who, "a setting without effect", found=found, fix=fix))
