"""Tokens to their experts and back, and what an expert does with them, as three operations that jzero knows by name.

Shapes: B examples, T tokens, D dim, K choices, E experts, F hidden dim, n devices that share the experts, C capacity.
Without a capacity an expert takes what comes: rows[R, D] sorted by expert, and how many each has. With one, each example may
send C of its tokens to an expert: rows[E / n, n B, C, D]. What a capacity drops is thus a matter of one example alone: it does
not change with the batch, the microbatch or the mesh.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jzero import _compat
from jzero._errors import explain
from jzero.moe import place as places
from jzero.moe import to_all, to_capacity
from jzero.moe.place import WHO, Place
from jzero.moe.routing import Routing


class Rows(NamedTuple):
    """Tokens where their experts are."""

    rows: jax.Array
    where: jax.Array  # int32[B, T, K]: the row of each choice, -1 where it was dropped
    counts: tuple[jax.Array, ...]  # without a capacity: rows per expert, and how to put them back for the way home
    capacity: int | None
    place: Place


def capacity_of(factor: float, *, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows per expert and example: `factor` times what an even router would send, rounded up.

    Raises:
      ValueError: the factor is not positive.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0 or math.isinf(factor):
        fix = "1.25 is Switch's; None drops nothing."
        raise ValueError(explain(WHO, "a capacity factor is a positive number", found=[f"capacity_factor={factor!r}"], fix=fix))
    return min(num_tokens, math.ceil(factor * num_tokens * top_k / num_experts))


def dispatch(x: jax.Array, routing: Routing, weights: jax.Array, *, capacity_factor: float | None = None) -> Rows:
    """Send every token to its experts. x[B, T, D]; `weights`, any of the experts' own, [E, ...] says which are here.

    With a capacity, a token's choice is dropped where C earlier choices of the same example (by token, then by rank) fell on
    the same expert: the token keeps what its other choices give it. Where experts are spread over n devices: one all-to-all of
    activations over `expert` forward and one backward, and without a capacity one of E counts. Its pieces have one size: with a
    capacity E/n * B * C * D each, without one B T min(K, E/n) D, which is what one device may get in the worst case.
    """
    capacity = None
    if capacity_factor is not None:
        capacity = capacity_of(
            capacity_factor, num_tokens=x.shape[1], top_k=routing.ids.shape[-1], num_experts=routing.num_experts
        )
    place = places.find(routing.num_experts, weights.shape[0], x.shape[0])
    rows, where, *counts = _DISPATCH(x, routing.ids, num_experts=routing.num_experts, capacity=capacity, place=place)
    return Rows(rows, where, tuple(counts), capacity, place)


def product(rows: Rows, weights: jax.Array) -> jax.Array:
    """Each row times the weights[E, D, F] of its expert: `ragged_dot` where experts have unequal numbers of rows."""
    (out,) = _PRODUCT(rows.rows, weights, *rows.counts[:1], place=rows.place)
    return out


def combine(rows: Rows, routing: Routing) -> jax.Array:
    """Bring the experts' results home and add them up, weighted by the router -> [B, T, D], in the dtype of the rows.

    Moves what `dispatch` moved, the other way: one all-to-all forward and one backward.
    """
    (out,) = _COMBINE(rows.rows, rows.where, routing.gates, *rows.counts[1:], capacity=rows.capacity, place=rows.place)
    return out


def swiglu(
    x: jax.Array, routing: Routing, gate: jax.Array, up: jax.Array, down: jax.Array, *, capacity_factor: float | None = None
) -> jax.Array:
    """Mixtral's experts, silu(x gate) * (x up) down. x[B, T, D]; gate and up[E, D, F], down[E, F, D] -> [B, T, D]."""
    rows = dispatch(x, routing, gate, capacity_factor=capacity_factor)
    h = jax.checkpoint(_gated)(product(rows, gate), product(rows, up))  # saves its two inputs, nothing between
    return combine(rows._replace(rows=product(rows._replace(rows=h), down)), routing)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _dispatch(x: jax.Array, ids: jax.Array, *, num_experts: int, capacity: int | None, place: Place) -> list[Any]:
    if capacity is None:
        run = partial(to_all.send, num_experts=num_experts, num_devices=place.num_devices)
        num_outs = 3 if place.num_devices == 1 else 4
    else:
        run = partial(to_capacity.send, num_experts=num_experts, capacity=capacity, num_devices=place.num_devices)
        num_outs = 2
    if place.mesh is None:
        return list(run(x, ids))
    by_example, _, by_expert = places.specs(place)
    first = by_example if capacity is None else by_expert
    return places.manually(run, place, (by_example, by_example), [first, *[by_example] * (num_outs - 1)], (x, ids))


def _product(rows: jax.Array, weights: jax.Array, *counts: jax.Array, place: Place) -> list[Any]:
    if place.mesh is None:
        return [_grouped(rows, weights, *counts)]
    by_example, of_experts, by_expert = places.specs(place)
    first = by_example if counts else by_expert
    run = lambda *args: [_grouped(*args)]
    return places.manually(run, place, (first, of_experts, *[by_example] * len(counts)), [first], (rows, weights, *counts))


def _grouped(rows: jax.Array, weights: jax.Array, *counts: jax.Array) -> jax.Array:
    if counts:
        return jax.lax.ragged_dot(rows, weights, counts[0])
    return jnp.einsum("ebcd,edf->ebcf", rows, weights)


def _combine(
    rows: jax.Array, where: jax.Array, gates: jax.Array, *counts: jax.Array, capacity: int | None, place: Place
) -> list[Any]:
    back = to_all.bring_back if capacity is None else to_capacity.bring_back

    def run(rows: jax.Array, where: jax.Array, gates: jax.Array, *counts: jax.Array) -> list[Any]:
        chosen = back(rows, where, *counts, num_devices=place.num_devices)  # [B, T, K, D]
        return [jnp.sum(chosen.astype(jnp.float32) * gates[..., None], axis=2).astype(rows.dtype)]

    if place.mesh is None:
        return run(rows, where, gates, *counts)
    by_example, _, by_expert = places.specs(place)
    first = by_example if capacity is None else by_expert
    ins: list[PartitionSpec] = [first, *[by_example] * (2 + len(counts))]
    return places.manually(run, place, ins, [by_example], (rows, where, gates, *counts))


_DISPATCH = _compat.primitive("jzero_expert_dispatch", _dispatch)
_PRODUCT = _compat.primitive("jzero_expert_product", _product)
_COMBINE = _compat.primitive("jzero_expert_combine", _combine)
