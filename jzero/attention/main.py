"""`jzero.attention`: exact attention, whether or not a mesh axis splits the sequence."""

import difflib
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

import pallas_kernels
from jzero._errors import columns, explain, suggest
from jzero._tree import short
from jzero._types import MESH_AXES
from jzero.attention import ring
from jzero.attention.place import Place, place, size, status
from jzero.attention.plain import NEVER_SPLIT, Attention, attend, choose_attention
from jzero.attention.ulysses import attend_by_heads

Kind = Literal["ulysses", "ring"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHO = "jzero.attention"


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, axis: str = "sequence", kind: Kind = "ulysses", causal: bool = True,
    segment_ids: jax.Array | None = None, implementation: Attention | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention q[B, T, H, C], k and v[B, T, K, C] -> [B, T, H, C], exact also where a mesh axis splits T.

    Under a step of `jzero.shard` on a mesh with that axis (or under `jax.set_mesh`) it runs as one `shard_map`: T over `axis`,
    B over the batch axes, heads over `tensor` where that divides H and K. On any other mesh, and on none, it is
    `pallas_kernels.attention` of whole sequences. With S = size of `axis`, and lengths, heads and bytes those of one device,
    the wire carries per pass

    - "ulysses": two all-to-alls, of the T_sequence (H + 2 K r) C elements of q, k and v and of the T_sequence H C of their
      result, (S-1)/S of each. Where S does not divide K, each key-value head is sent r = S / gcd(K, S) times. S divides H.
    - "ring": S - 1 permutes of T_sequence 2 K C elements, each behind a block of attention; the backward pass sends gradients
      of that size in float32 too. A causal ring is balanced, for which chunks of the sequence change places first: two permutes
      of half a piece of q, k and v, two for the result. 2 S divides T (S if not causal). Softmax in float32.

    Memory of the backward pass: "ring" keeps its operands, its result and one float32 per query and head, whatever S;
    "ulysses" keeps what plain attention would, for 1/S of the heads.

    Args:
      q, k, v: one dtype; K divides H (grouped queries).
      axis: the mesh axis. Inside a `shard_map` in which it is manual, operands are that device's pieces (segment_ids whole).
      kind: "ulysses" or "ring". Needs less wire: "ulysses", as long as S divides the heads; "ring" needs no heads.
      causal: queries see no later keys.
      segment_ids: int[B, T]; queries see only keys of their own segment. Each device gets all T of them.
      implementation: of what a device computes by itself (`pallas_kernels.attention`): "cudnn", "splash", "plain" or "chunked";
        None chooses. A ring has its own.

    Raises:
      ValueError: shapes that disagree, an unknown kind, heads or a length that the axis does not divide.
      TypeError: dtypes that disagree, segment ids that are no integers.

    Example:
      >>> import jax.numpy as jnp
      >>> q, k = jnp.ones((1, 6, 4, 8)), jnp.ones((1, 6, 2, 8))
      >>> attention(q, k, k).shape
      (1, 6, 4, 8)

    References:
      Jacobs et al., DeepSpeed Ulysses, 2023. Liu et al., Ring Attention, 2023. Brandon et al., Striped Attention, 2023.
    """
    _check(q, k, v, axis, kind, segment_ids, implementation)
    if status(axis) == "absent":
        return _whole(q, k, v, segment_ids, axis, partial(attend, causal=causal, implementation=implementation), implementation)
    where = place(axis, q.shape[0], q.shape[2], k.shape[2])
    is_local = status(axis) == "manual"
    _check_divides(q, k, where, kind, causal, is_local)
    if kind == "ring":
        num_kv_heads = k.shape[2] // (1 if is_local else size(where.heads))
        return _ring(ring.Ring(axis, causal, num_kv_heads), where, is_local, q, k, v, segment_ids)
    local = partial(attend_by_heads, axis=axis, causal=causal, implementation=implementation)
    return _on_pieces(local, where, is_local, [*[_ACTIVATION] * 3, _IDS], _ACTIVATION)(q, k, v, segment_ids)


def _whole(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, axis: str, run: Any, implementation: Any
) -> jax.Array:
    """On sequences in one piece. The kernel that no partitioner can split is given one device's examples and heads."""
    where = place(axis, q.shape[0], q.shape[2], k.shape[2])
    kind = pallas_kernels.dispatch.device_kind()
    if not where.axes - {axis} or (implementation or choose_attention(q, k, device_kind=kind)) != NEVER_SPLIT:
        return run(q, k, v, segment_ids=segment_ids)
    local = lambda q, k, v, segment_ids: run(q, k, v, segment_ids=segment_ids)
    return _on_pieces(local, where._replace(axis=None), False, [*[_ACTIVATION] * 3, _IDS], _ACTIVATION)(q, k, v, segment_ids)


_ACTIVATION = ("batch", "length", "heads", None)
_IDS = ("batch", None)
_CHUNKS = (None, "batch", "length", "heads", None)
_STATS = (None, "batch", "heads", None, "length")


def _on_pieces(local: Any, where: Place, is_local: bool, ins: Any, outs: Any) -> Any:
    """`local` on one device's pieces of global arrays; what is None stays out of it."""
    if is_local:
        return local

    def run(*args: Any) -> Any:
        is_nested = bool(jax.sharding.get_abstract_mesh().manual_axes)
        present = [index for index, arg in enumerate(args) if arg is not None]

        def on_pieces(*given: Any) -> Any:
            full: list[Any] = [None] * len(args)
            for index, value in zip(present, given, strict=True):
                full[index] = value
            with pallas_kernels.dispatch.inside_another() if is_nested else nullcontext():
                return local(*full)

        specs = where.spec(*outs) if isinstance(outs[0], str | None) else tuple(where.spec(*dims) for dims in outs)
        mapped = jax.shard_map(
            on_pieces, in_specs=tuple(where.spec(*ins[index]) for index in present), out_specs=specs, axis_names=where.axes,
            check_vma=False,
        )  # fmt: skip
        return mapped(*(args[index] for index in present))

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(
    kind: ring.Ring, where: Place, is_local: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    return _ring_forward(kind, where, is_local, q, k, v, segment_ids)[0]


def _ring_forward(
    kind: ring.Ring, where: Place, is_local: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, Any]:
    local = partial(ring.forward, ring=kind)
    run = _on_pieces(local, where, is_local, [*[_ACTIVATION] * 3, _IDS], [_ACTIVATION, _CHUNKS, _STATS])
    out, fused, log_total = run(q, k, v, segment_ids)
    return out, (fused, log_total, segment_ids, out)


def _ring_backward(kind: ring.Ring, where: Place, is_local: bool, saved: Any, out_grad: jax.Array) -> Any:
    fused, log_total, segment_ids, out = saved
    local = partial(ring.backward, ring=kind)
    run = _on_pieces(local, where, is_local, [_CHUNKS, _STATS, _IDS, _ACTIVATION, _ACTIVATION], [_ACTIVATION] * 3)
    return *run(fused, log_total, segment_ids, out, out_grad), None


_ring.defvjp(_ring_forward, _ring_backward)


def check_kind(kind: Any) -> None:
    """Raise a `ValueError` unless it is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(explain(WHO, "unknown kind", found=[f"kind={kind!r}"], fix=suggest(kind, KINDS)))


def _check(q: Any, k: Any, v: Any, axis: Any, kind: Any, segment_ids: Any, implementation: Any) -> None:
    """What is wrong on any mesh."""
    check_kind(kind)
    if implementation not in (None, *get_args(Attention)):
        found = [f"implementation={implementation!r}"]
        raise ValueError(explain(WHO, "unknown implementation", found=found, fix=suggest(implementation, get_args(Attention))))
    known = (*MESH_AXES, *jax.sharding.get_abstract_mesh().axis_names)
    if axis not in known and (not isinstance(axis, str) or difflib.get_close_matches(axis, known, n=1)):
        raise ValueError(explain(WHO, "unknown mesh axis", found=[f"axis={axis!r}"], fix=suggest(axis, known)))
    rows = [[name, short(part)] for name, part in (("q", q), ("k", k), ("v", v))]
    if len({part.dtype for part in (q, k, v)}) > 1:
        fix = "Cast them to the compute dtype; softmax is in float32 by itself."
        raise TypeError(explain(WHO, "q, k and v have one dtype", found=columns(rows), fix=fix))
    if any(part.ndim != 4 for part in (q, k, v)):
        fix = "Reshape: q.reshape(batch, length, heads, head_dim)."
        raise ValueError(explain(WHO, "q, k and v are [batch, length, heads, head_dim]", found=columns(rows), fix=fix))
    others = lambda part: (*part.shape[:2], part.shape[3])
    if k.shape != v.shape or others(q) != others(k) or not k.shape[2] or q.shape[2] % k.shape[2]:
        problem = "k and v have one shape, and q the same but for its heads, a multiple of theirs"
        fix = "Give q[B, T, H, C] and k, v[B, T, K, C] with K a divisor of H."
        raise ValueError(explain(WHO, problem, found=columns(rows), fix=fix))
    if segment_ids is None:
        return
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        fix = "Number the segments of each row: int32[B, T]."
        raise TypeError(explain(WHO, "segment_ids are integers", found=[short(segment_ids)], fix=fix))
    if segment_ids.shape != q.shape[:2] and status(axis) != "manual":
        found = columns([["segment_ids", short(segment_ids)], *rows[:1]])
        fix = f"Give segment_ids[{q.shape[0]}, {q.shape[1]}], one for each position of q."
        raise ValueError(explain(WHO, "segment_ids are [batch, length] of q", found=found, fix=fix))


def _check_divides(q: jax.Array, k: jax.Array, where: Place, kind: Kind, causal: bool, is_local: bool) -> None:
    """What does not fit this mesh, with the sizes that would."""
    num, own = size(where.length), 1 if is_local else size(where.heads)
    length, num_heads = q.shape[1] * (num if is_local else 1), q.shape[2] // own
    context = f"mesh {dict(jax.sharding.get_abstract_mesh().shape)}; kind={kind!r}, causal={causal}"
    pieces = num * (2 if kind == "ring" and causal else 1)
    if length % pieces:
        below, above = length // pieces * pieces, -(-length // pieces) * pieces
        fit = [size for size in range(2, length + 1) if not length % (size * (pieces // num))]
        found = [f"q is {short(q)}: length {length} is no multiple of {pieces}", f"'{where.axis}' has size {num}"]
        fix = (
            f"Use a length of {' or '.join(str(size) for size in (below, above) if size)} (give padding a segment of its own), "
            f"or a size of '{where.axis}' among {_some(fit)}."
        )
        raise ValueError(explain(WHO, f"the length is split into {pieces} equal pieces", found=found, context=context, fix=fix))
    if kind == "ulysses" and num_heads % num:
        fit = [size for size in range(2, num_heads + 1) if not num_heads % size]
        each = f", {num_heads} on each piece of '{where.heads[0]}'" if where.heads else ""
        found = [f"q is {short(q)}: {q.shape[2]} heads{each}", f"'{where.axis}' has size {num}"]
        fix = f"Use a size of '{where.axis}' among {_some(fit)}, or kind='ring', which splits no heads."
        raise ValueError(explain(WHO, "heads are split over the axis", found=found, context=context, fix=fix))


def _some(sizes: list[int]) -> str:
    shown = ", ".join(map(str, sizes[:12])) + (", ..." if len(sizes) > 12 else "")
    return shown or "none but 1"
