"""The router: which experts each token goes to, with what weight, and the two losses that keep it well-behaved."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jzero._errors import explain
from jzero.comm import over_batch_mean

WHO = "jzero.moe"


class Routing(NamedTuple):
    """What the router decided for x[B, T, D]. B examples, T tokens, K choices."""

    ids: jax.Array  # int32[B, T, K], K different experts
    gates: jax.Array  # float32[B, T, K]
    balance: jax.Array  # float32[]: 1 where all experts are chosen equally, at most E
    z: jax.Array  # float32[]
    num_experts: int


def route(x: jax.Array, kernel: jax.Array, *, top_k: int, gates: Literal["chosen", "all"] = "chosen") -> Routing:
    """Each token's `top_k` experts by logits x @ kernel, in float32 whatever the dtype of `x`.

    balance = E sum_e f_e P_e, with f_e the share of choices that fell on expert e and P_e the mean of its probability, both
    over the whole batch; z = mean of logsumexp(logits)^2. Both are the same in every shard (`jzero.over_batch_mean`: one
    all-reduce of 2 E + 1 floats forward and backward where shards compute on their own), so they may be added to a mean and,
    times its weight, to the sum of a `jzero.weighted`. Under `accumulate` they are each microbatch's.

    Args:
      x: tokens[B, T, D]; examples on dim 0.
      kernel: [D, E].
      top_k: experts per token.
      gates: weights are a softmax over the chosen experts' logits (Mixtral), or over all of which the chosen are kept (Switch).

    Raises:
      ValueError: `top_k` is not between 1 and the number of experts, x is not [B, T, D], or an unknown `gates`.

    References:
      Fedus et al.: Switch Transformers, 2022, equations 4 to 6. Zoph et al.: ST-MoE, 2022, equation 5. Lepikhin et al.: GShard,
      2021. Jiang et al.: Mixtral of Experts, 2024.
    """
    num_experts = kernel.shape[-1]
    _check(x, num_experts, top_k, gates)
    logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logits, top_k)
    weights = jax.nn.softmax(top, axis=-1) if gates == "chosen" else jnp.take_along_axis(probabilities, ids, axis=-1)
    chosen = jax.nn.one_hot(ids, num_experts, dtype=jnp.float32).sum(axis=2) / top_k
    z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    share, mean, z = over_batch_mean((jnp.mean(chosen, axis=(0, 1)), jnp.mean(probabilities, axis=(0, 1)), z))
    balance = num_experts * jnp.sum(share * mean)
    return Routing(ids, weights, balance, z, num_experts)


def _check(x: Any, num_experts: int, top_k: int, gates: str) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        found, fix = [f"top_k={top_k!r}"], f"Use 1 to {num_experts}; 1 is Switch's and 2 Mixtral's."
        raise ValueError(explain(WHO, f"a token goes to 1 to {num_experts} of {num_experts} experts", found=found, fix=fix))
    if gates not in ("chosen", "all"):
        fix = "gates='chosen' is a softmax over the chosen experts, 'all' over all of them."
        raise ValueError(explain(WHO, "gates= is 'chosen' or 'all'", found=[f"gates={gates!r}"], fix=fix))
    if x.ndim != 3:
        found, fix = [f"x{list(x.shape)}"], "Give it [examples, tokens, dim]; one token per example is [B, 1, D]."
        raise ValueError(explain(WHO, "tokens come as x[B, T, D]", found=found, fix=fix))
