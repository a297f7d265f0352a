"""What is compared: plain JAX as one writes it by hand, and the same model and optimizer under each ZeRO stage."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jzero import audit as audits
from jzero import precision as precisions
from jzero import remat as remats
from jzero._tree import num_bytes
from jzero.bench.setup import Setup
from jzero.mesh import axis_size, batch_axes
from jzero.models import pipeline
from jzero.shard import shard
from jzero.step import make_train_step

_STATIC_FP16_SCALE = 2.0**12  # plain JAX gets no dynamic loss scale: that is what one line of jzero adds


@dataclass
class Trial:
    """One contender on its way: `step(state, tokens) -> (state, loss)`, what its program costs, what was measured."""

    stage: int | None  # None: plain JAX
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    state: Any
    costs: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return "plain JAX" if self.stage is None else f"stage {self.stage}"


def plain(setup: Setup, tokens: jax.Array) -> Trial:
    """Hand-written data parallelism: one `jit`, parameters and optimizer replicated, the batch split."""
    whole = jax.NamedSharding(setup.mesh, jax.P())
    jitted = jax.jit(
        plain_step(setup), in_shardings=(whole, setup.batch_sharding), out_shardings=(whole, whole), donate_argnums=0
    )

    def make_state(key: jax.Array) -> tuple[Any, Any]:
        params = setup.model.init(key)
        return params, setup.optimizer.init(params)

    state = jax.jit(make_state, out_shardings=whole)(jax.random.key(setup.options.seed))
    start = time.perf_counter()
    compiled = jitted.lower(state, tokens).compile()
    seconds = time.perf_counter() - start
    return Trial(None, compiled, state, {**_plain_costs(compiled, state, tokens, setup), "compile_s": seconds})


def plain_step(setup: Setup) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """`(state, tokens) -> (state, loss)` with `optax` and nothing of jzero but the model and its remat policy."""
    policy, num = precisions.get(setup.precision), setup.accumulate
    scale = _STATIC_FP16_SCALE if policy.scales_loss else 1.0
    loss_fn = remats.apply(setup.model.loss, remats.get(setup.options.remat))

    def scaled_loss(params: Any, tokens: jax.Array) -> jax.Array:
        return loss_fn(precisions.cast(params, policy.compute), tokens) * scale

    def loss_and_grads(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(scaled_loss)(params, tokens)
        return loss / scale, jax.tree.map(lambda grad: grad / scale, grads)

    def step(state: tuple[Any, Any], tokens: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, opt_state = state
        # Rows i, i + num, ... form microbatch i, so that every device keeps its own rows.
        micro = tokens.reshape(-1, num, tokens.shape[1]).swapaxes(0, 1)
        sums, _ = jax.lax.scan(
            lambda total, one: (jax.tree.map(jnp.add, total, loss_and_grads(params, one)), None),
            jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params)),
            micro,
        ) if num > 1 else (loss_and_grads(params, tokens), None)  # fmt: skip
        loss, grads = jax.tree.map(lambda total: total / num, sums)
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def _plain_costs(compiled: jax.stages.Compiled, state: tuple[Any, Any], tokens: jax.Array, setup: Setup) -> dict[str, Any]:
    """The same figures as a report's, for a program that jzero did not write; it has no formula for the wire."""
    measured = audits.audit(compiled, setup.mesh)
    wire = {
        axis: {kind: {"measured": num, "formula": None} for kind, num in kinds.items()}
        for axis, kinds in measured.wire_bytes.items()
    }
    roles = {"params": state[0], "opt_state": state[1], "batch": tokens}
    rest = {role: {"measured": _bytes_on_a_device(tree), "formula": _whole_bytes(tree)} for role, tree in roles.items()}
    rest["batch"]["formula"] //= axis_size(setup.mesh, batch_axes(setup.mesh))
    costs = {"bytes_at_rest": rest, "wire_bytes": wire, "temp_bytes": measured.temp_bytes, "peak_bytes": measured.peak_bytes}
    return {**costs, "findings": []}


def _bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _whole_bytes(tree: Any) -> int:
    return sum(map(num_bytes, jax.tree.leaves(tree)))


def staged(setup: Setup, tokens: jax.Array, stage: int) -> Trial:
    """The same loss and optimizer through `jzero.make_train_step` and `jzero.shard`."""
    options = setup.options
    loss, arrange = setup.model.loss, lambda params: params
    if axis_size(setup.mesh, "pipe") > 1:
        loss, arrange = pipeline(setup.model)
    train_step = make_train_step(loss, setup.optimizer, precision=setup.precision, accumulate=setup.accumulate)
    step = shard(train_step, stage=stage, mesh=setup.mesh, remat=options.remat, rules=setup.tensor_rules)
    state = step.init(lambda key: train_step.init(arrange(setup.model.init(key))), jax.random.key(options.seed))
    start = time.perf_counter()
    report = step.report(state, tokens).to_dict()  # compiles
    costs = {name: report[name] for name in ("bytes_at_rest", "wire_bytes", "temp_bytes", "peak_bytes", "findings")}

    def advance(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        state, metrics = step(state, tokens)
        return state, metrics["loss"]

    return Trial(stage, advance, state, {**costs, "compile_s": time.perf_counter() - start})
