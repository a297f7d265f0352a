"""Cross-entropy of x @ w without the logits in memory: the head of a language model."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._errors import explain, short
from pallas_kernels.dispatch import Call, Implementation, Op
from pallas_kernels.linear_cross_entropy import chunked, chunks, fused, reference


def _floating(call: Call) -> str | None:
    x, w = call.arrays[:2]
    return None if x.dtype == w.dtype else f"x is {x.dtype} and w {w.dtype}; it takes one dtype for both"


def _large(call: Call) -> str | None:
    """Whether the logits of one example are so large that computing them twice is the smaller evil.

    From one example, not from the batch: jzero compares a program at two batch sizes, and they must be the same program.
    """
    x, w = call.arrays[:2]
    num_bytes = x.shape[-2] * w.shape[call.options["vocab_dim"]] * x.dtype.itemsize
    return f"one example's logits take {num_bytes / 1e6:,.0f} MB" if num_bytes > chunks.LARGE_BYTES else None


def _too_large(call: Call) -> str | None:
    """Only where the batch is surely not split: under Auto axes the loop over parts would hold a reduction of each."""
    return _large(call) if call.is_local else None


LOSSES = Op(
    "linear_cross_entropy",
    [Implementation("chunked", chunked.losses, _floating), Implementation("reference", reference.losses)],
)
TOTAL = Op(
    "linear_cross_entropy_sum",
    [
        Implementation("fused", fused.total, _floating, loses=_too_large),
        Implementation("chunked", chunked.total, _floating),
        Implementation("reference", reference.total),
    ],
)


def linear_cross_entropy(
    x: jax.Array, w: jax.Array, targets: jax.Array, *, vocab_dim: int = 1, vocab_size: int | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int | None = None, soft_cap: float | None = None,
    axis_name: str | None = None, num_chunks: int | None = None, implementation: str | None = None,
) -> jax.Array:  # fmt: skip
    """One loss per token: -log p(target) with p = softmax(x @ w), logits made and dropped part by part.

    With l the logits, e = label_smoothing: lse(l) - (1 - e) l[target] - e mean(l) + z_loss lse(l)^2.

    Args:
      x: [..., T, D], any float dtype, split over devices in any dim but D.
      w: [D, V], or [V, D] with vocab_dim=0 (an embedding table), of x's dtype. Logits are written in that dtype, as a plain
        matmul's are, and summed in float32.
      targets: integers [..., T]; one that is no column (and not ignore_index) is not checked: it counts as a logit of 0.
      vocab_size: columns from here on are padding.
      ignore_index: tokens with this target have loss 0 and no gradient.
      soft_cap: l = cap tanh(l / cap).
      axis_name: inside `shard_map`, the mesh axis that splits V. Two scalars per token are added up over it in the forward
        pass, and x's gradient in the backward pass.
      num_chunks: parts of the vocabulary; None is 8.
      implementation: "chunked" or "reference".

    Returns:
      float32[..., T]. Divide by what the mean is over.

    The backward pass computes the logits again, one third more arithmetic than with logits kept: where the losses are only
    summed, `linear_cross_entropy_sum` can do without.

    Raises:
      ValueError: shapes that disagree, an unknown implementation.
      NotImplementedError: a named implementation that cannot do this.

    Example:
      >>> x, w = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
      >>> print(linear_cross_entropy(x, w, jnp.zeros((2, 3), int))[0, 0])  # log 8
      2.0794415
    """
    options = _options(vocab_dim, vocab_size, label_smoothing, z_loss, ignore_index, soft_cap, axis_name, num_chunks)
    _check("linear_cross_entropy", x, w, targets, targets, options)
    return LOSSES(x, w, targets, implementation=implementation, **options)


def linear_cross_entropy_sum(
    x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array | None = None, *, vocab_dim: int = 1,
    vocab_size: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int | None = None,
    soft_cap: float | None = None, axis_name: str | None = None, num_chunks: int | None = None,
    implementation: str | None = None,
) -> jax.Array:  # fmt: skip
    """The sum of weights[..., T] (None: ones) times the losses of `linear_cross_entropy`, in float32.

    "fused": the forward pass of a gradient computes the gradients of x and w too, so nothing is computed twice, and the logits
    are gone before the backward pass of what comes before the head. "chunked": as `linear_cross_entropy`, an eighth of the
    logits at a time, computed twice; chosen where one example's logits pass 256 MiB.

    Args, errors: as `linear_cross_entropy`; implementations "fused", "chunked", "reference".

    Example:
      >>> x, w, targets = jnp.ones((2, 3, 4)), jnp.zeros((4, 8)), jnp.zeros((2, 3), int)
      >>> print(linear_cross_entropy_sum(x, w, targets) / targets.size)
      2.0794415

    References:
      Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024. Wijmans et al., Cut Your Losses, 2024.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    options = _options(vocab_dim, vocab_size, label_smoothing, z_loss, ignore_index, soft_cap, axis_name, num_chunks)
    _check("linear_cross_entropy_sum", x, w, targets, weights, options)
    return TOTAL(x, w, targets, weights, implementation=implementation, **options)


def _options(*values: Any) -> dict[str, Any]:
    return dict(zip((*reference.Loss._fields[:7], "num_chunks"), values, strict=True))


def _check(who: str, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, options: dict[str, Any]) -> None:
    """Shapes that fit together, and options that mean something."""
    vocab_dim, vocab_size = options["vocab_dim"], options["vocab_size"]
    problems = []
    if x.ndim < 2 or w.ndim != 2 or vocab_dim not in (0, 1) or x.shape[-1] != w.shape[1 - vocab_dim]:
        wanted = "[D, V]" if vocab_dim == 1 else "[V, D]"
        problems.append(f"x[..., T, D] and w{wanted} are {short(x)} and {short(w)} with vocab_dim={vocab_dim}")
    if targets.shape != x.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        problems.append(f"targets[..., T] must be integers of shape {list(x.shape[:-1])}, got {short(targets)}")
    if weights.shape != targets.shape:
        problems.append(f"weights[..., T] must have the targets' shape, got {short(weights)}")
    if options["axis_name"] is None and w.ndim == 2 and vocab_size is not None and not 0 < vocab_size <= max(w.shape):
        problems.append(f"vocab_size={vocab_size} of {short(w)}")
    if (options["num_chunks"] or 1) < 1:
        problems.append(f"num_chunks={options['num_chunks']} must be at least 1")
    if problems:
        fix = "Pass activations before the head, the head's weight, and one target per token."
        context = f"vocab_dim={vocab_dim}: w is {'[D, V]' if vocab_dim == 1 else '[V, D]'}"
        raise ValueError(
            explain(f"pallas_kernels.{who}", "arrays do not fit together", found=problems, context=context, fix=fix)
        )
