"""`moments_8bit`: any optax transformation with its moments in bytes between steps."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jzero._errors import explain
from jzero._tree import is_float, leaves_with_path, num_elements, path_parts
from jzero.optim import blocks

WHO = "jzero.optim.moments_8bit"


class Moments8bitState(NamedTuple):
    """The inner state with codes where moments were, and beside it their scales.

    Codes stand in the moment's place and shape, so they are sharded as the parameter is. Scales have no names, so that rules
    about a parameter's name do not reach them: their shape is another.
    """

    inner: Any  # uint8 where a moment is kept in 8 bits
    scales: tuple[jax.Array | None, ...]  # one for each leaf of `inner`: float32 for codes, None for others


def moments_8bit(
    optimizer: optax.GradientTransformation, *, nonnegative: Iterable[str] = ("nu",), min_elements: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with each floating-point array of its state in 8 bits between updates: block-wise, dynamic map.

    Bytes of a moment of n elements: n + 4 n / 256, where float32 has 4 n. The update itself is computed in float32 from what
    the codes stand for. Blocks never cross a shard that the stages' rule makes, so nothing travels; a rule of your own that
    splits the dim that blocks run along (the largest but one) makes the partitioner move them, and the report names it.

    Args:
      optimizer: any whose state tolerates a relative error of 1 to 5%: moments do, means of parameters do not.
      nonnegative: names in the state's paths of arrays that are never negative and get the map without a sign: `nu` is the
        second moment of optax's Adam, AdamW, LAMB, NAdam and AdaBelief.
      min_elements: smaller arrays stay as they are: they cost nothing, and embeddings' norms and biases are sensitive.

    Returns:
      A transformation whose state is a `Moments8bitState`.

    Raises:
      ValueError: a name that no array of the state has, when the state is made.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = moments_8bit(optax.adamw(1e-3))
      >>> state = tx.init({"w": jnp.zeros((256, 256))})
      >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)), sum(leaf.nbytes for leaf in jax.tree.leaves(state.inner))
      (133124, 131076)

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, 2022 (equation 5). One departure: a
      second moment that is not zero is never rounded to zero.
    """
    inner = optax.with_extra_args_support(optimizer)
    names = frozenset(nonnegative)

    def init(params: Any) -> Any:
        state = inner.init(params)
        _check_names(names, state)
        return _packed(state, names, min_elements)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, after = inner.update(updates, _unpacked(state, names), params, **extra)
        return updates, _packed(after, names, min_elements)

    return optax.GradientTransformationExtraArgs(init, update)


def _signs(state: Any, names: frozenset[str]) -> list[bool]:
    """Per leaf: whether it may be negative."""
    return [not names & set(path_parts(path)) for path, _ in leaves_with_path(state)]


def _packed(state: Any, names: frozenset[str], min_elements: int) -> Moments8bitState:
    leaves, treedef = jax.tree.flatten(state)
    codes, scales = [], []
    for leaf, signed in zip(leaves, _signs(state, names), strict=True):
        small = not (is_float(leaf) and leaf.ndim > 0 and num_elements(leaf) >= min_elements)
        code, scale = (leaf, None) if small else blocks.quantize(leaf, signed=signed)
        codes.append(code)
        scales.append(scale)
    return Moments8bitState(jax.tree.unflatten(treedef, codes), tuple(scales))


def _unpacked(state: Moments8bitState, names: frozenset[str]) -> Any:
    codes, treedef = jax.tree.flatten(state.inner)
    rows = zip(codes, state.scales, _signs(state.inner, names), strict=True)
    values = [code if scale is None else blocks.dequantize(code, scale, signed=signed) for code, scale, signed in rows]
    return jax.tree.unflatten(treedef, values)


def _check_names(names: frozenset[str], state: Any) -> None:
    paths = [path_parts(path) for path, leaf in leaves_with_path(state) if is_float(leaf) and jnp.ndim(leaf)]
    unknown = sorted(name for name in names if name != "nu" and not any(name in path for path in paths))
    if unknown:
        found = [f"nonnegative={unknown}", *sorted({"/".join(path[:-1]) or path[-1] for path in paths})[:5]]
        fix = "Name a part of a path of the optimizer's state, such as 'nu'."
        raise ValueError(explain(WHO, "no array of the optimizer's state has this name", found=found, fix=fix))
