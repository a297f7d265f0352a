"""Updates of leaves in files that are larger than a bucket: slice by slice, driven from the host.

A slice is some rows of dim 0 of each moment, which lie one after the other in its file. The program takes whole parameters and
gradients, which are on the device anyway, and the slices of the moments; it writes new parameters over the gradients' slice.
Parameters that rest in files travel by the same rows as their moments. So what is in memory at a time does not depend on how
large a leaf is, as long as its update is elementwise.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jzero._tree import num_bytes
from jzero.engine import compiler
from jzero.engine.bucket_program import BucketProgram
from jzero.engine.layout import Layout, Options
from jzero.offload.asked import NVME
from jzero.offload.nvme.array import DiskArray
from jzero.offload.nvme.shard_file import part_bytes
from jzero.offload.slices import Slices, is_elementwise


class SlicedProgram(BucketProgram):
    """The update of one bucket, in one round, or if it has to be in several."""

    cut: Slices | None = None

    @property
    def num_rounds(self) -> int:
        return self.cut.num if self.cut else 1

    @property
    def held_bytes(self) -> int:
        return self.bucket.moved_bytes // self.num_rounds

    def at_rest(self, state: Any, number: int) -> list[Any]:
        """What round `number` fetches, from the state's leaves by their numbers."""
        leaves = [state[index] for index in self.fetched]
        if self.cut is None:
            return leaves
        return [leaf.part(number, self.cut.num) if isinstance(leaf, DiskArray) else leaf for leaf in leaves]

    def whole(self, leaf: Any) -> Any:
        """The leaf of the state that a round's result belongs to."""
        return leaf if self.cut is None or isinstance(leaf, jax.Array) else leaf.whole

    @cached_property
    def fetched(self) -> list[int]:
        """The numbers of the leaves that a round fetches."""
        return list(self.members if self.cut is None or self.params_travel else self.bucket.opt_state)

    @cached_property
    def params_travel(self) -> bool:
        """Whether the bucket's parameters rest in files."""
        return self._in_files(self.bucket.params)

    def _in_files(self, indices: Sequence[int]) -> bool:
        return all((place := self.plan.layout.places[index]) and place.kind == NVME for index in indices)

    def _slices(self) -> Slices | None:
        if not any((place := self.plan.layout.places[index]) and place.kind == NVME for index in self.members):
            return super()._slices()
        layout, members = self.plan.layout, self.members
        shapes = {layout.avals[index].shape for index in members}
        travelling = members if self.params_travel else self.bucket.opt_state
        specs = {layout.on_device[index].spec for index in members}
        whole = self._alike and all(layout.places[index] is None for index in self.bucket.params)
        is_large, can_go = self.bucket.moved_bytes > self.plan.bucket_bytes, self.params_travel or whole
        if is_large and can_go and len(shapes) == len(specs) == 1 and self._in_files(self.bucket.opt_state):
            (shape,) = shapes
            if is_elementwise(self.jaxpr, shape):
                wanted = -(-self.bucket.moved_bytes // self.plan.bucket_bytes)
                self.cut = rows([layout.avals[index] for index in travelling], layout.on_device[members[0]], wanted)
        return None

    def _lower(self, layout: Layout, options: Options, keeps_params: bool) -> Any:
        if self.cut is None:
            return super()._lower(layout, options, keeps_params)
        sharding_of = dict(zip(self.members, self.shardings, strict=True))
        aval = lambda index, shape: jax.ShapeDtypeStruct(shape, layout.avals[index].dtype, sharding=sharding_of[index])
        params, opt_state, all_of = self.bucket.params, self.bucket.opt_state, [leaf.shape for leaf in layout.avals]
        whole_own = not self.params_travel or self.plan.held.issuperset(params)
        own = [aval(index, all_of[index] if whole_own else self.cut.shape(all_of[index])) for index in params]
        moments = [aval(index, self.cut.shape(all_of[index])) for index in opt_state]
        grads, *values = self._handed_over([None] * len(self.grad_at))
        whole = NamedSharding(options.mesh, PartitionSpec())
        placed = [[leaf.sharding for leaf in part] for part in (own, moments)]
        jitted = jax.jit(
            self._rows if self.params_travel else self._one, in_shardings=(*placed, placed[0], whole, whole, whole, whole),
            out_shardings=[*placed[0], *placed[1]] if self.params_travel else tuple(placed),
            donate_argnums=(1, 2) if not self.params_travel else (1,) if whole_own else (0, 1), keep_unused=True,
            compiler_options=compiler.options(options.mesh),
        )  # fmt: skip
        return jitted.lower(own, moments, grads, *values, jax.ShapeDtypeStruct((), jnp.int32))

    def _one(
        self, own: list[Any], moments: list[Any], grads: list[Any], scales: Any, shared: Any, early: Any, index: jax.Array
    ) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """One round: the gradients with new parameters in a slice, and the slice's new moments."""
        cut = self.cut
        assert cut is not None
        new = self._rows(own, moments, grads, scales, shared, early, index)
        pairs = zip(grads, new[: len(own)], strict=True)
        return [cut.put(grad, piece, index) for grad, piece in pairs], new[len(own) :]

    def _rows(
        self, own: list[Any], moments: list[Any], grads: list[Any], scales: Any, shared: Any, early: Any, index: jax.Array
    ) -> list[Any]:  # fmt: skip
        """The slice's new parameters and moments, from moments' slices and whole gradients; parameters are either."""
        cut = self.cut
        assert cut is not None
        shape = cut.shape(self.plan.layout.avals[self.members[0]].shape)
        parts = [cut.take(grad, index) for grad in grads]
        own = [one if one.shape == shape else cut.take(one, index) for one in own]
        return self._computed([*own, *moments], parts, scales, shared, early, shape)


def rows(avals: Sequence[Any], sharding: NamedSharding, wanted: int) -> Slices | None:
    """At least `wanted` slices of as many rows each, which begin where a part of the files does; where rows are larger than
    that as many as there can be, and None if the files have no such rows.
    """
    shape = avals[0].shape
    if len(sharding.spec) and sharding.spec[0] is not None:
        return None
    sizes = [num_bytes(jax.ShapeDtypeStruct(sharding.shard_shape(aval.shape), aval.dtype)) for aval in avals]
    parts = [part_bytes(size, shape[0]) for size in sizes]
    most = min(size // part for size, part in zip(sizes, parts, strict=True))
    limit = min(most, shape[0])
    for num in (*range(max(wanted, 2), limit + 1), *range(min(wanted - 1, limit), 1, -1)):
        if shape[0] % num == 0 and all(size // num % part == 0 for size, part in zip(sizes, parts, strict=True)):
            return Slices(0, num, shape[0] // num)
    return None
