"""The compiled update of one bucket, under Auto axes as the whole update is otherwise."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jzero import _compat
from jzero.engine import compiler, computing
from jzero.engine.layout import Layout, Options
from jzero.engine.offloaded import Update
from jzero.gather.away import Space, moved
from jzero.offload import slices
from jzero.offload.asked import HOST, NVME
from jzero.offload.buckets import Bucket
from jzero.offload.host import KIND
from jzero.offload.slices import Slices, is_elementwise
from jzero.step import update


class BucketProgram:
    """The compiled update of one bucket: `(leaves, grads, scales, shared, early) -> leaves`, the leaves donated.

    A bucket of one group that is larger than a bucket should be takes its leaves where they rest and fetches slices of them
    itself, if its update is elementwise. One that the host updates takes them where they rest too (what rests in files, from
    host memory); gradients and what rests on the device travel, and the latter back. With `keeps_params` the old state stays
    valid; new parameters take the memory of the gradients where these have their dtype, or of what came from files.
    """

    def __init__(self, plan: Update, bucket: Bucket, options: Options, *, keeps_params: bool = False):
        self.plan, self.bucket = plan, bucket
        self.members = (*bucket.params, *bucket.opt_state)
        trained, arrays = ({index: at for at, index in enumerate(part)} for part in (plan.trained, plan.arrays))
        self.param_at, self.array_at = [trained[i] for i in bucket.params], [arrays[i] for i in bucket.opt_state]
        self.grad_at = [at for at, (index, _) in enumerate(plan.grads) if index in self.members]
        num_params, num_arrays, num_scalars = plan.num_outputs
        chosen = {*self.param_at, *(num_params + at for at in self.array_at)}
        outputs = [at in chosen for at in range(num_params + num_arrays + num_scalars)]
        self.jaxpr, self.used = plan.split.part(outputs)
        self.slices = self._slices()
        layout = plan.layout
        self.shardings = [self._sharding(index) for index in self.members]
        self.places = [None if self._stays(index) else layout.places[index] for index in self.members]
        self.lowered = self._lower(layout, options, keeps_params)
        self.compiled = computing.compiled(self.lowered, bucket)

    def __call__(self, members: list[Any], grads: list[Any], *values: list[Any]) -> list[Any]:
        num_params = len(self.bucket.params)
        return self.compiled(members[:num_params], members[num_params:], grads, *values)

    def _stays(self, index: int) -> bool:
        """Whether the program takes a leaf where it rests."""
        place = self.plan.layout.places[index]
        return place is None or (place.kind == HOST and (self.slices is not None or self.bucket.on_host))

    def _sharding(self, index: int) -> NamedSharding:
        """Where the program takes a leaf."""
        layout = self.plan.layout
        if self._stays(index):
            return layout.shardings[index]
        return layout.on_device[index].with_memory_kind(KIND) if self.bucket.on_host else layout.on_device[index]

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
        placed = {
            layout.on_device[index] for index in self.members
        }  # moments may be split where a step keeps its parameters whole
        if (len(placed) > 1 and self.bucket.on_host) or not is_elementwise(self.jaxpr, shape):
            return None
        on_tpu = layout.mesh.devices.flat[0].platform == "tpu"
        return slices.cut(shape, [*placed], size, plan.bucket_bytes, on_tpu=on_tpu)

    def _run(self, members: list[Any], grads: list[Any], scales: list[Any], shared: list[Any], early: list[Any]) -> list[Any]:
        if self.slices is None:
            return self._computed(members, grads if self.bucket.on_host else _here(grads), scales, shared, early)
        # Where the program sees them: for GPUs that are only described the memory kind is dropped, and all is device memory.
        cut, is_away = self.slices, [jax.typeof(one).memory_space == Space.Host for one in members]
        shape, on_host = cut.shape(self.plan.layout.avals[self.members[0]].shape), self.bucket.on_host

        def one_slice(index: jax.Array, members: list[Any]) -> list[Any]:
            """What rests away is fetched slice by slice; the host takes slices of it where it rests, and puts them back."""
            stays = [away and on_host for away in is_away]
            pieces = [one if stay else cut.take(one, index) for one, stay in zip(members, stays, strict=True)]
            parts = [cut.take(grad, index) for grad in grads]
            if on_host:
                new = self._computed(pieces, parts, scales, shared, early, shape, stays, index)
            else:
                pieces = [_move(one, Space.Device, away) for one, away in zip(pieces, is_away, strict=True)]
                new = self._computed(pieces, _here(parts), scales, shared, early, shape)
                new = [_move(one, Space.Host, away) for one, away in zip(new, is_away, strict=True)]
            every = zip(members, new, stays, strict=True)
            return [piece if stay else cut.put(one, piece, index) for one, piece, stay in every]

        return jax.lax.fori_loop(0, cut.num, one_slice, members)

    def _computed(
        self, members: list[Any], grads: list[Any], scales: list[Any], shared: list[Any], early: list[Any],
        shape: tuple[int, ...] | None = None, whole: Sequence[bool] = (), index: Any = None,
    ) -> list[Any]:  # fmt: skip
        """New members from old ones, each in the memory of the old one.

        Args:
          shape: of a slice, where these are slices.
          whole: which members are whole for all that, of which slice `index` is updated in place.
        """
        parts = {"members": members, "grads": grads, "shared": shared, "early": early, "consts": self.plan.split.consts}
        marks = self._inputs(**{name: [(name, at) for at in range(len(part))] for name, part in parts.items()})
        given = {(name, at): parts[name][at] for name, at in marks} | {("members", at): one for at, one in enumerate(members)}

        cut: Any = self.slices

        def run(given: dict[tuple[str, int], Any], scales: list[Any], index: Any) -> list[Any]:
            scale = lambda mark, one: update.scaled([one], scales)[0] if mark[0] == "grads" else one
            values = {mark: scale(mark, one) for mark, one in given.items()}
            within = [("members", at) for at, yes in enumerate(whole) if yes]
            values |= {mark: cut.take(given[mark], index) for mark in within}
            inputs = [values[mark] for mark in marks]
            new = _compat.evaluate(self.jaxpr, inputs) if shape is None else slices.evaluate(self.jaxpr, inputs, shape)
            for mark in within:
                new[mark[1]] = cut.put(given[mark], new[mark[1]], index)
            return new

        if not self.bucket.on_host:
            return run(given, scales, index)
        return _compat.on_host(run, (given, scales, index), [jax.typeof(one).memory_space for one in members])

    def _inputs(
        self, members: Sequence[Any], grads: Sequence[Any], shared: Sequence[Any], early: Sequence[Any], consts: Sequence[Any]
    ) -> list[Any]:  # fmt: skip
        """What the part of the traced update takes."""
        num_params, num_arrays, _ = self.plan.num_outputs
        params: list[Any] = [None] * num_params
        given: list[Any] = [None] * len(self.plan.grads)
        arrays: list[Any] = [None] * num_arrays
        for at, leaf in zip(self.param_at, members, strict=False):
            params[at] = leaf
        for at, grad in zip(self.grad_at, grads, strict=True):
            given[at] = grad
        for at, leaf in zip(self.array_at, members[len(self.param_at) :], strict=True):
            arrays[at] = leaf
        every = [*consts, *self.plan.inputs(params, given, arrays, shared)[len(consts) :], *early]
        return [value for value, keep in zip(every, self.used, strict=True) if keep]

    def _lower(self, layout: Layout, options: Options, keeps_params: bool) -> Any:
        every = zip((layout.avals[index] for index in self.members), self.shardings, strict=True)
        avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in every]
        grads, *values = self._handed_over(self._of_grads())
        whole = NamedSharding(options.mesh, PartitionSpec())
        num_params = len(self.bucket.params)
        own, opt_state = self.shardings[:num_params], self.shardings[num_params:]
        alike = self._alike and not any(sharding.memory_kind == KIND for sharding in (*own, *self._of_grads()))
        jitted = jax.jit(
            lambda own, opt_state, grads, *values: self._run([*own, *opt_state], grads, *values),
            in_shardings=(own, opt_state, self._of_grads(), whole, whole, whole),
            donate_argnums=self._donated(options, keeps_params, alike),
            out_shardings=self.shardings, keep_unused=True, compiler_options=compiler.options(options.mesh),
        )  # fmt: skip
        return jitted.lower(avals[:num_params], avals[num_params:], grads, *values)

    def _handed_over(self, placed: Sequence[NamedSharding | None]) -> tuple[list[jax.ShapeDtypeStruct], ...]:
        """What the gradient program hands to this one: gradients, `placed` so, their scales, what all buckets get."""
        plan = self.plan
        grads = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
            for aval, sharding in zip((plan.grads[at][1] for at in self.grad_at), placed, strict=True)
        ]
        early = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in plan.split.early]
        return grads, [jax.ShapeDtypeStruct((), jnp.float32)] * plan.num_scales, plan.shared, early

    @property
    def _alike(self) -> bool:
        """Whether each parameter has one gradient, of its dtype: whose memory may become the new parameter's."""
        grads = [self.plan.grads[at] for at in self.grad_at]
        dtypes = [(index, self.plan.layout.avals[index].dtype) for index in self.bucket.params]
        return [(index, aval.dtype) for index, aval in grads] == dtypes

    def _of_grads(self) -> list[NamedSharding]:
        """Where gradients are when the update begins: of parameters that came at their uses, where these rest."""
        layout, at_use = self.plan.layout, self.plan.at_use
        numbers = [self.plan.grads[at][0] for at in self.grad_at]
        return [(layout.shardings if index in at_use else layout.on_device)[index] for index in numbers]

    def _donated(self, options: Options, keeps_params: bool, alike: bool) -> tuple[int, ...]:
        """Parameters are the gradient program's copies, or the state's own; gradients nobody wants any more. Where the state
        that came in stays valid: copies of what rests elsewhere, and gradients for new parameters.
        """
        params, opt_state = self.bucket.params, self.bucket.opt_state
        if not keeps_params:
            own = [place is None for place in self.places[len(params) :]]  # the state's own arrays
            return (0, 1) if options.donate or not any(own) else (0,)
        places = self.plan.layout.places
        moments = (1,) if all(places[index] is not None for index in opt_state) else ()
        if all((place := places[index]) is not None and place.kind == NVME for index in params):
            return (0, *moments)
        return (*moments, 2) if alike else moments


def _here(grads: Sequence[jax.Array]) -> list[jax.Array]:
    """Gradients on the device, also those that wait in host memory."""
    return [moved(grad, Space.Device) for grad in grads]


def _move(piece: jax.Array, memory: Any, is_away: bool) -> jax.Array:
    return jax.device_put(piece, memory) if is_away else piece
