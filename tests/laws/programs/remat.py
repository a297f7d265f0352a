"""Losses that rematerialise."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from programs.table import LOSSES, SQUARE, STACK, Loss, V, W, loss, mlp

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "only_names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "any_names_but": jax.checkpoint_policies.save_anything_except_these_names("weight"),
    "offloadless": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["hidden"], names_which_can_be_offloaded=[], offload_src="device", offload_dst="pinned_host"
    ),
}


def rematerialised(policy, p, x, t):
    def layer(h, w):
        return checkpoint_name(jnp.tanh(h @ checkpoint_name(w, "weight")), "hidden") @ p["shared"], None

    h = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["first"]), policy=policy)(p, x)
    return jnp.mean(lax.scan(jax.checkpoint(layer, policy=policy), h, p["layers"])[0] ** 2)


for _name, _policy in POLICIES.items():
    LOSSES[f"remat_{_name}"] = Loss(partial(rematerialised, _policy), {"first": SQUARE, "shared": SQUARE, "layers": STACK})


@loss(w=W, v=V)
def remat_of_everything(p, x, t):
    return jax.checkpoint(lambda p, x: jnp.mean(jax.checkpoint(mlp)(p, x) ** 2))(p, x)


@loss(w=W, v=V)
def named_parameter(p, x, t):
    p = {name: checkpoint_name(leaf, name) for name, leaf in p.items()}
    policy = jax.checkpoint_policies.save_only_these_names("w")
    return jax.checkpoint(lambda p, x: jnp.mean(mlp(p, x) ** 2), policy=policy)(p, x)
