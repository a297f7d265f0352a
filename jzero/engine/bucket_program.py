"""The compiled update of one bucket, under Auto axes as the whole update is otherwise."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jzero import _compat
from jzero.engine import compiler
from jzero.engine.layout import Layout, Options
from jzero.engine.offloaded import Update
from jzero.offload import slices
from jzero.offload.asked import HOST, NVME
from jzero.offload.buckets import Bucket
from jzero.offload.slices import Slices, is_elementwise
from jzero.step import update


class BucketProgram:
    """The compiled update of one bucket: `(leaves, grads, scales, shared, early) -> leaves`, the leaves donated.

    A bucket of one group that is larger than a bucket should be takes its leaves where they rest and fetches slices of them
    itself, if its update is elementwise. With `keeps_params` the old state stays valid; new parameters take the memory of the
    gradients where these have their dtype, or of what came from files.
    """

    def __init__(self, plan: Update, bucket: Bucket, options: Options, *, keeps_params: bool = False):
        self.plan, self.bucket = plan, bucket
        self.members = (*bucket.params, *bucket.opt_state)
        trained, arrays = ({index: at for at, index in enumerate(part)} for part in (plan.trained, plan.arrays))
        self.param_at, self.array_at = [trained[i] for i in bucket.params], [arrays[i] for i in bucket.opt_state]
        num_params, num_arrays, num_scalars = plan.num_outputs
        chosen = {*self.param_at, *(num_params + at for at in self.array_at)}
        outputs = [at in chosen for at in range(num_params + num_arrays + num_scalars)]
        self.jaxpr, self.used = plan.split.part(outputs)
        self.slices = self._slices()
        layout = plan.layout
        self.shardings = [(layout.shardings if self.slices else layout.on_device)[index] for index in self.members]
        self.places = [None if self.slices else layout.places[index] for index in self.members]
        self.lowered = self._lower(layout, options, keeps_params)
        self.compiled = self.lowered.compile()

    def __call__(self, members: list[Any], grads: list[Any], *values: list[Any]) -> list[Any]:
        num_params = len(self.bucket.params)
        return self.compiled(members[:num_params], members[num_params:], grads, *values)

    @property
    def held_bytes(self) -> int:
        """What of the bucket is on the device at a time."""
        return self.bucket.moved_bytes // (self.slices.num if self.slices else 1)

    def _slices(self) -> Slices | None:
        plan, layout, size = self.plan, self.plan.layout, self.bucket.moved_bytes
        shapes = {layout.avals[index].shape for index in self.members}
        in_host = all(place is None or place.kind == HOST for place in (layout.places[index] for index in self.members))
        if size <= plan.bucket_bytes or len(shapes) > 1 or not in_host:
            return None
        (shape,) = shapes
        specs = {layout.on_device[index].spec for index in self.members}
        if len(specs) > 1 or not is_elementwise(self.jaxpr, shape):
            return None
        return slices.cut(shape, layout.on_device[self.members[0]], size, plan.bucket_bytes)

    def _run(self, members: list[Any], grads: list[Any], scales: list[Any], shared: list[Any], early: list[Any]) -> list[Any]:
        if self.slices is None:
            return _compat.evaluate(self.jaxpr, self._inputs(members, update.scaled(grads, scales), shared, early))
        # Where the program sees them: for GPUs that are only described the memory kind is dropped, and all is device memory.
        cut, is_away = self.slices, [jax.typeof(one).memory_space == jax.memory.Space.Host for one in members]
        shape = cut.shape(self.plan.layout.avals[self.members[0]].shape)

        def one_slice(index: jax.Array, members: list[Any]) -> list[Any]:
            pieces = [cut.take(one, index) for one in members]
            pieces = [_move(one, jax.memory.Space.Device, away) for one, away in zip(pieces, is_away, strict=True)]
            parts = update.scaled([cut.take(grad, index) for grad in grads], scales)
            given = self._inputs(pieces, parts, shared, early)
            new = slices.evaluate(self.jaxpr, given, shape)
            new = [_move(one, jax.memory.Space.Host, away) for one, away in zip(new, is_away, strict=True)]
            return [cut.put(one, piece, index) for one, piece in zip(members, new, strict=True)]

        return jax.lax.fori_loop(0, cut.num, one_slice, members)

    def _inputs(self, members: list[Any], grads: list[Any], shared: list[Any], early: list[Any]) -> list[Any]:
        """What the part of the traced update takes."""
        num_params, num_arrays, _ = self.plan.num_outputs
        params: list[Any] = [None] * num_params
        given: list[Any] = [None] * num_params
        arrays: list[Any] = [None] * num_arrays
        for at, leaf, grad in zip(self.param_at, members, grads, strict=False):
            params[at], given[at] = leaf, grad
        for at, leaf in zip(self.array_at, members[len(self.param_at) :], strict=True):
            arrays[at] = leaf
        every = [*self.plan.inputs(params, given, arrays, shared), *early]
        return [value for value, keep in zip(every, self.used, strict=True) if keep]

    def _lower(self, layout: Layout, options: Options, keeps_params: bool) -> Any:
        every = zip((layout.avals[index] for index in self.members), self.shardings, strict=True)
        avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in every]
        params = self.bucket.params
        grads = [jax.ShapeDtypeStruct(layout.avals[index].shape, self.plan.accumulate_dtype) for index in params]
        state = jax.tree.unflatten(layout.treedef, layout.avals)
        shared = [*(layout.avals[index] for index in self.plan.scalars), state.step, state.rng]
        shared.append(jax.ShapeDtypeStruct((), jnp.float32))
        whole = NamedSharding(options.mesh, PartitionSpec())
        num_params, alike = len(params), all(layout.avals[index].dtype == self.plan.accumulate_dtype for index in params)
        own, opt_state = self.shardings[:num_params], self.shardings[num_params:]
        jitted = jax.jit(
            lambda own, opt_state, grads, *values: self._run([*own, *opt_state], grads, *values),
            in_shardings=(own, opt_state, [layout.on_device[index] for index in params], whole, whole, whole),
            donate_argnums=self._donated(alike) if keeps_params else (0, 1),
            out_shardings=self.shardings, keep_unused=True, compiler_options=compiler.options(options.mesh),
        )  # fmt: skip
        early = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self.plan.split.early]
        scales = [jax.ShapeDtypeStruct((), jnp.float32)] * self.plan.num_scales
        return jitted.lower(avals[:num_params], avals[num_params:], grads, scales, shared, early)

    def _donated(self, alike: bool) -> tuple[int, ...]:
        """Where the state that came in stays valid: copies of what rests elsewhere, and gradients for new parameters."""
        places = self.plan.layout.places
        moments = (1,) if all(places[index] is not None for index in self.bucket.opt_state) else ()
        if all((place := places[index]) is not None and place.kind == NVME for index in self.bucket.params):
            return (0, *moments)
        return (*moments, 2) if alike else moments


def _move(piece: jax.Array, memory: Any, is_away: bool) -> jax.Array:
    return jax.device_put(piece, memory) if is_away else piece
