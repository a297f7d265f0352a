"""Rules of primitives that compute along some dims. The examples meet if the batch dim is among them; a sum may stay a sum."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jzero.reduction.equation import Equation, Rule, settled
from jzero.reduction.pointwise import only_per_example, product
from jzero.reduction.states import (
    BACKFLOW,
    PAIRS,
    AnyState,
    Claim,
    Constant,
    Independent,
    Mixing,
    PerExample,
    Sum,
    is_plain,
    snap,
    total,
)

Dims = Callable[[Equation], Sequence[int]]


def _claim(eq: Equation, *, linear: bool) -> Claim | Constant:
    """The one claim of all operands, whose shapes are equal."""
    return total(settled(eq), eq.in_shapes[0]) if linear else only_per_example(settled(eq))


def reduce_sum(eq: Equation) -> AnyState:
    state, axes = settled(eq)[0], eq.params["axes"]
    if isinstance(state, PerExample) and state.dim in axes:
        return Sum(snap(state.ratio * eq.out.factor))
    return _without(state, axes)


def _without(state: AnyState, axes: Sequence[int]) -> AnyState:
    if not isinstance(state, PerExample):
        return state
    return replace(state, dim=state.dim - sum(axis < state.dim for axis in axes))


def reduction(name: str) -> Callable[[Equation], AnyState]:
    """A reduction that is no sum, over the dims in the parameter `name`."""

    def rule(eq: Equation) -> AnyState:
        state = _claim(eq, linear=False)
        if isinstance(state, PerExample) and state.dim in eq.params[name]:
            raise Mixing("over the batch dim")
        return _without(state, eq.params[name])

    return rule


def generic_reduce(eq: Equation) -> AnyState:
    """`reduce(*operands, *initial values)` with any function."""
    half = len(eq.ins) // 2
    if not all(map(is_plain, eq.ins[half:])):
        raise Mixing("a reduction's initial value depends on the examples")
    return reduction("dimensions")(eq._replace(ins=eq.ins[:half], in_shapes=eq.in_shapes[:half]))


def along(dims: Dims, *, linear: bool = False) -> Callable[[Equation], AnyState]:
    """Works along `dims` and keeps the others where they are: sorts, cumulative sums, transforms, factorizations."""

    def rule(eq: Equation) -> AnyState:
        state = _claim(eq, linear=linear)
        if isinstance(state, PerExample) and state.dim in [d % eq.rank for d in dims(eq)]:
            raise Mixing("along the batch dim")
        return state

    return rule


def param(name: str) -> Dims:
    return lambda eq: (eq.params[name],)


def last(num_dims: int) -> Dims:
    return lambda eq: range(-num_dims, 0)


def dot_general(eq: Equation) -> AnyState:
    """Bilinear. Contracting the batch dims of both is a sum over examples; batching them keeps examples apart."""
    left, right = settled(eq)
    if not (isinstance(left, PerExample) or isinstance(right, PerExample)):
        return product([left, right])
    if isinstance(left, Sum) or isinstance(right, Sum):
        raise Mixing(BACKFLOW)
    ratio = snap(left.ratio * right.ratio)
    roles = [_role(eq, side) for side, state in enumerate((left, right)) if isinstance(state, PerExample)]
    rows = [state for state in (left, right) if isinstance(state, PerExample)]
    if len(rows) == 2 and (roles[0] != roles[1] or rows[0].outer != rows[1].outer):
        raise Mixing(PAIRS)
    kind, place = roles[0]
    return Sum(snap(ratio * eq.out.factor)) if kind == "contract" else PerExample(place, rows[0].outer, ratio)


def _role(eq: Equation, side: int) -> tuple[str, int]:
    """What `dot_general` does with an operand's batch dim, and the index in its list or in the result."""
    contract, batch = (pair[side] for pair in eq.params["dimension_numbers"])
    dim = eq.in_shapes[side].batch_dim()
    assert dim is not None  # its state is per-example
    if dim in contract:
        return "contract", tuple(contract).index(dim)
    if dim in batch:
        return "batch", tuple(batch).index(dim)
    free = [d for d in range(len(eq.in_shapes[side].small)) if d not in contract and d not in batch]
    left_free = eq.rank - len(contract) - len(batch) if side else 0
    return f"free in {side}", len(batch) + left_free + free.index(dim)


def convolution(eq: Equation) -> AnyState:
    """Bilinear. Only the batch dim of the images may hold examples, and not in groups."""
    image, kernel = settled(eq)
    numbers = eq.params["dimension_numbers"]
    if isinstance(image, PerExample) and isinstance(kernel, Independent):
        if image.dim != numbers.lhs_spec[0] or eq.params["batch_group_count"] != 1:
            raise Mixing("a convolution runs along the batch dim")
        return replace(image, dim=numbers.out_spec[0], ratio=snap(image.ratio * kernel.ratio))
    if isinstance(kernel, PerExample):
        raise Mixing("a convolution whose kernel holds examples")
    return product([image, kernel])


def window(*, linear: bool) -> Callable[[Equation], AnyState]:
    """Pooling and its kin: each window must hold one example."""

    def rule(eq: Equation) -> AnyState:
        num_arrays = sum(bool(shapes.small) for shapes in eq.in_shapes)  # the initial values after them are scalars
        if not all(map(is_plain, eq.ins[num_arrays:])):
            raise Mixing("a window's initial value depends on the examples")
        state = _claim(eq._replace(ins=eq.ins[:num_arrays], in_shapes=eq.in_shapes[:num_arrays]), linear=linear)
        if isinstance(state, PerExample) and not _one_example_per_window(eq.params, state.dim):
            raise Mixing("a window runs along the batch dim")
        return state

    return rule


def _one_example_per_window(params: Any, dim: int) -> bool:
    sizes = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    return all(params[name][dim] == 1 for name in sizes if name in params) and tuple(params["padding"][dim]) == (0, 0)


def fused_attention(eq: Equation) -> PerExample:
    """cuDNN's attention of q, k, v[B, ...]: each example attends to itself."""
    return _apart(eq.ins, PerExample(0))


def fused_attention_gradient(eq: Equation) -> PerExample:
    """Linear in the last operand, the cotangent. A bias's gradient, a sum, has another shape and is refused for that."""
    *operands, cotangent = eq.ins
    if not isinstance(cotangent, PerExample) or (cotangent.dim, cotangent.outer) != (0, 1):
        raise Mixing(PAIRS)
    return _apart(operands, cotangent)


def _apart(operands: Sequence[AnyState], result: PerExample) -> PerExample:
    if not all(state == PerExample(0) or is_plain(state) for state in operands):
        raise Mixing(PAIRS)
    return result


RULES = {
    "reduce_sum": Rule(reduce_sum),
    **dict.fromkeys(
        ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"),
        Rule(reduction("axes")),
    ),
    "reduce": Rule(generic_reduce),
    "cumsum": Rule(along(param("axis"), linear=True)),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod"), Rule(along(param("axis")))),
    "sort": Rule(along(param("dimension"))),
    "top_k": Rule(along(param("axis"))),
    "approx_top_k": Rule(along(param("reduction_dimension"))),
    "split": Rule(along(param("axis"), linear=True)),
    "rev": Rule(along(lambda eq: eq.params["dimensions"], linear=True)),
    "fft": Rule(along(lambda eq: range(-len(eq.params["fft_lengths"]), 0), linear=True)),
    **dict.fromkeys(
        ("cholesky", "eig", "eigh", "householder_product", "lu", "qr", "geqrf", "svd", "triangular_solve"), Rule(along(last(2)))
    ),
    "lu_pivots_to_permutation": Rule(along(last(1))),
    "dot_general": Rule(dot_general),
    "dot_product_attention_fwd_wrapper": Rule(fused_attention),
    "dot_product_attention_bwd_wrapper": Rule(fused_attention_gradient),
    "conv_general_dilated": Rule(convolution),
    "reduce_window_sum": Rule(window(linear=True)),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window"), Rule(window(linear=False))),
}
