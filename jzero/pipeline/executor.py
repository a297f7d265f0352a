"""Runs any valid schedule: inside `shard_map` over `pipe`, one scan over ticks, and in each tick a switch on the table's entry.

It knows no schedule's name. A tick of one device is

    input        what arrived for this microbatch; on the first virtual stage the embedding
    layers       a loop over the layers of the stage: gather its parameters, switch on the operation, reduce its gradients
    head         after the last layer: loss and its gradient at once, so that no logits are kept
    embedding    its gradient, once the first layer's is known
    exchange     two `ppermute`: activations to the next device of the ring, gradients to the one before

and everything waits in the buffers that `slots.assign` has measured. No collective stands under a condition on which devices
differ: gathers and reductions of a layer run in every tick, bubbles too, and those of embedding and head in the ticks in which
*some* device needs them, which all devices know from the table. So no device can wait for one that went another way.

Layers that a stage has not (uneven splits are padded to the largest) are idle turns of the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jzero.pipeline import buffers
from jzero.pipeline.backward import LayerPrograms
from jzero.pipeline.buffers import Arrays
from jzero.pipeline.ends import Ends, HeadSums
from jzero.pipeline.entry import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD
from jzero.pipeline.slots import Cell, Slots
from jzero.step import batch as batches

AXIS = "pipe"


class Sharing(Protocol):
    """How parameters are held over the data axis. Whatever is not split passes through."""

    @property
    def in_ticks(self) -> bool: ...  # whether anything is gathered or reduced inside the table

    def gather(self, shards: Sequence[Any], part: str) -> Arrays: ...
    def reduce(self, grads: Sequence[Any], part: str, chosen: Sequence[int]) -> Arrays: ...


class Job(NamedTuple):
    """What the pipeline runs."""

    slots: Slots
    layer: LayerPrograms
    ends: Ends
    sharing: Sharing
    num_stage_layers: int  # of the largest virtual stage
    is_stacked: bool  # else every device has all layers as one, which takes the number of the virtual stage as its last leaf
    trained_layer: Sequence[int]  # leaves of a layer that train
    trained_outer: Sequence[int]
    accumulate: Any  # dtype
    seed: jax.Array
    trains: bool = True


class Flags(NamedTuple):
    """Of one tick, the same on all devices: whether some device embeds, ends, returns, makes weight gradients."""

    embeds: Any
    ends: Any
    returns: Any
    reduces: Any


class Carry(NamedTuple):
    """What lives from tick to tick. Buffers are `[slots, ...]`, `saved` and `kept` `[slots, layers, ...]`."""

    activations: Arrays
    gradients: Arrays
    saved: Arrays
    kept: Arrays
    layer_grads: Arrays  # [layers of this device, ...]
    outer_grads: Arrays
    sums: HeadSums


def columns(slots: Slots) -> np.ndarray:
    """The table as int32[ticks, pipe stages, fields], dim 1 to be split over `pipe`."""
    return np.array(slots.cells, np.int32).reshape(len(slots.cells), -1, len(Cell._fields))


def flags(slots: Slots) -> np.ndarray:
    """bool[ticks, 4], for all devices."""
    making = {1 + slots.ops.index(op) for op in (BACKWARD, WEIGHT_GRAD) if op in slots.ops}

    def row(cells: Sequence[Cell]) -> list[bool]:
        some = [any(getattr(cell, name) for cell in cells) for name in ("embeds", "ends", "returns")]
        return [*some, any(cell.op in making for cell in cells)]

    return np.array([row(cells) for cells in slots.cells], bool)


def run(
    job: Job, cells: jax.Array, counts: jax.Array, layers: Arrays, outer: Arrays, batch: Any, num_micro: int
) -> tuple[Arrays, Arrays, HeadSums]:
    """The table on one device of `pipe`.

    Args:
      cells: int32[ticks, fields], this device's column.
      counts: int32[chunks], how many of its padded layers each chunk really has.
      layers: leaves `[chunks x num_stage_layers, ...]` of this device, whole or as shards over data.
      outer: leaves of embedding, head and tied ones.
      batch: this device's rows of the batch, all microbatches.

    Returns:
      Gradients of the trained leaves of `layers` and of `outer` (the latter zero where another pipe stage has them), and the
      sums of the heads (zero on all but the last).
    """
    each, shared = batches.split(batch, num_micro)
    micro = lambda index: batches.merge(buffers.at(each, index), shared)
    tick = _Tick(job, counts, layers, outer, micro)
    carry, _ = jax.lax.scan(tick, tick.start(num_micro), (cells, jnp.asarray(flags(job.slots))))
    return carry.layer_grads, carry.outer_grads, carry.sums


class _Tick:
    """The body of the scan over ticks."""

    def __init__(self, job: Job, counts: Any, layers: Arrays, outer: Arrays, micro: Callable[[Any], Any]):
        self.job, self.counts, self.layers, self.outer, self.micro = job, counts, layers, outer, micro
        shapes = jax.eval_shape(lambda: (self._whole_outer(), micro(0)))
        self.x = jax.eval_shape(job.ends.embed, *shapes)
        self.head_shapes = jax.eval_shape(
            lambda outer, batch, x: job.ends.sums(job.ends.head(outer, x, batch)), *shapes, self.x
        )
        self.codes = {op: 1 + index for index, op in enumerate(job.slots.ops)}

    def start(self, num_micro: int) -> Carry:
        job, slots = self.job, self.job.slots
        per_layer = lambda num, shapes: [buffers.zeros(leaf, num, job.num_stage_layers) for leaf in shapes]
        waiting = lambda num: [buffers.zeros(leaf, max(num, 1)) for leaf in self.x]
        sums = jax.tree.map(buffers.zeros, self.head_shapes)
        sums = sums._replace(batched=[buffers.zeros(leaf, num_micro) for leaf in self.head_shapes.batched])
        if not job.trains:
            return Carry(waiting(slots.num_activations), [], [], [], [], [], sums)
        kept = per_layer(slots.num_kept, job.layer.kept) if slots.num_kept else []
        saved = per_layer(slots.num_saved, job.layer.saved)
        waits = waiting(slots.num_activations), waiting(slots.num_gradients)
        return Carry(*waits, saved, kept, *self._no_gradients(), sums)

    def _no_gradients(self) -> tuple[Arrays, Arrays]:
        """Totals of the layers and of the ends, in the shape that `Sharing.reduce` leaves."""
        job = self.job
        num_rows = (self.layers[0].shape[0],) if job.is_stacked else ()
        shapes = [leaf for leaf, yes in zip(job.layer.params, job.layer.mask, strict=True) if yes]
        ends = [leaf for index, leaf in enumerate(jax.eval_shape(self._whole_outer)) if index in job.trained_outer]

        def zeros(leaves: Sequence[Any], part: str, chosen: Sequence[int], num: tuple[int, ...]) -> Arrays:
            wide = [jax.ShapeDtypeStruct(leaf.shape, job.accumulate) for leaf in leaves]
            reduced = jax.eval_shape(lambda grads: job.sharing.reduce(grads, part, chosen), wide)
            return [jnp.zeros((*num, *leaf.shape), job.accumulate) for leaf in reduced]

        return zeros(shapes, "layer", job.trained_layer, num_rows), zeros(ends, "outer", job.trained_outer, ())

    def __call__(self, carry: Carry, row: tuple[Any, Any]) -> tuple[Carry, None]:
        cell, flag = Cell(*row[0]), Flags(*row[1])
        batch = self.micro(cell.microbatch)
        x = self._input(carry, cell, flag, batch)
        y, carry = self._layers(carry, cell, flag, x)
        carry = self._head(carry, cell, flag, batch, y)
        if self.job.trains:
            carry = self._embedding(carry, cell, flag, batch, y)
        return self._exchange(carry, cell, y), None

    def _input(self, carry: Carry, cell: Cell, flag: Flags, batch: Any) -> Arrays:
        """Of a forward pass the activation that arrived, or the embedding; of a backward pass the gradient."""
        x = buffers.at(carry.activations, jnp.maximum(cell.reads_activation, 0))

        def embed(outer: Arrays) -> Arrays:
            return jax.lax.cond(cell.embeds > 0, lambda: self.job.ends.embed(outer, batch), lambda: x)

        if self.job.sharing.in_ticks:
            needed = self.job.ends.embed_leaves
            x = jax.lax.cond(flag.embeds, lambda: embed(self._whole_outer(needed)), lambda: x)
        else:
            x = embed(self.outer)
        if not self.job.trains:
            return x
        dy = buffers.at(carry.gradients, jnp.maximum(cell.reads_gradient, 0))
        is_forward = cell.op == self.codes[FORWARD]
        return [jnp.where(is_forward, *pair) for pair in zip(x, dy, strict=True)]

    def _whole_outer(self, needed: Sequence[int] | None = None) -> Arrays:
        """Embedding and head's leaves; only those that are needed are gathered."""
        if not self.job.sharing.in_ticks:
            return self.outer
        chosen = range(len(self.outer)) if needed is None else needed
        whole = self.job.sharing.gather([leaf if i in chosen else None for i, leaf in enumerate(self.outer)], "outer")
        return [self.outer[i] if leaf is None else leaf for i, leaf in enumerate(whole)]

    def _layers(self, carry: Carry, cell: Cell, flag: Flags, x: Arrays) -> tuple[Arrays, Carry]:
        """The stage's layers, up for forward and down for backward."""
        job = self.job
        down = jnp.asarray(False)
        for op in (BACKWARD, INPUT_GRAD):
            down |= cell.op == self.codes.get(op, -1)
        count = buffers.at(self.counts, cell.chunk)
        slot, kept_slot = jnp.maximum(cell.saved, 0), jnp.maximum(cell.kept, 0)

        def turn(state: tuple[Any, ...], k: Any) -> tuple[tuple[Any, ...], None]:
            x, saved, kept, grads = state
            layer = jnp.where(down, job.num_stage_layers - 1 - k, k)
            op = jnp.where(layer < count, cell.op, 0)
            own = cell.chunk * job.num_stage_layers + layer
            params = job.sharing.gather(self._own(cell, own), "layer")
            old = buffers.get(saved, (slot, layer)), buffers.get(kept, (kept_slot, layer))
            x, new_saved, new_kept, fresh = jax.lax.switch(op, self._branches(), params, x, *old)
            saved, kept = buffers.put(saved, (slot, layer), new_saved), buffers.put(kept, (kept_slot, layer), new_kept)
            if grads:
                grads = buffers.add(grads, own if job.is_stacked else None, self._reduced_layer(flag, fresh))
            return (x, saved, kept, grads), None

        state = (x, carry.saved, carry.kept, carry.layer_grads)
        (x, saved, kept, grads), _ = jax.lax.scan(turn, state, jnp.arange(job.num_stage_layers))
        return x, carry._replace(saved=saved, kept=kept, layer_grads=grads)

    def _own(self, cell: Cell, layer: Any) -> list[Any]:
        """The parameters of one layer, or of all of them and which to use."""
        if self.job.is_stacked:
            return buffers.at(self.layers, layer)
        return [*self.layers, cell.chunk * jax.lax.axis_size(AXIS) + cell.stage]

    def _reduced_layer(self, flag: Flags, fresh: Arrays) -> Arrays:
        """A layer's gradients as this device accumulates them; ticks in which no device makes any reduce nothing."""
        job = self.job
        if not job.sharing.in_ticks:
            return fresh
        reduce = lambda: job.sharing.reduce(fresh, "layer", job.trained_layer)
        shapes = jax.eval_shape(reduce)
        return jax.lax.cond(flag.reduces, reduce, lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes])

    def _branches(self) -> list[Callable[..., Any]]:
        """What each operation makes of (params, x, saved, kept): x for the next layer, what is saved and kept, gradients."""
        layer = self.job.layer
        shapes = [leaf for leaf, yes in zip(layer.params, layer.mask, strict=True) if yes and self.job.trains]
        nothing = lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]

        def idle(params: Arrays, x: Arrays, saved: Arrays, kept: Arrays) -> Any:
            return x, saved, kept, nothing()

        def forward(params: Arrays, x: Arrays, saved: Arrays, kept: Arrays) -> Any:
            y, fresh = layer.forward(params, x)
            return y, fresh if self.job.trains else saved, kept, nothing()

        def backward(params: Arrays, x: Arrays, saved: Arrays, kept: Arrays) -> Any:
            dx, grads = layer.backward(params, saved, x)
            return dx, saved, kept, grads

        def input_grad(params: Arrays, x: Arrays, saved: Arrays, kept: Arrays) -> Any:
            dx, fresh = layer.input_grad(params, saved, x)
            return dx, saved, fresh, nothing()

        def weight_grad(params: Arrays, x: Arrays, saved: Arrays, kept: Arrays) -> Any:
            return x, saved, kept, layer.weight_grad(params, saved, kept)

        known = {FORWARD: forward, BACKWARD: backward, INPUT_GRAD: input_grad, WEIGHT_GRAD: weight_grad}
        return [idle, *(known[op] for op in self.job.slots.ops)]

    def _head(self, carry: Carry, cell: Cell, flag: Flags, batch: Any, y: Arrays) -> Carry:
        """Loss and first gradient of a microbatch, in a loop of one turn or none: what it adds to is changed in place."""
        job, ends = self.job, self.job.ends

        def compute(outer: Arrays) -> tuple[Arrays, Arrays, HeadSums]:
            if job.trains:
                return ends.head_grad(outer, y, batch, job.seed)
            return [], [], ends.sums(ends.head(outer, y, batch))

        def turn(_: Any, carry: Carry) -> Carry:
            dy, grads, sums = self._alone(compute, cell.ends, ends.head_leaves)
            if job.trains:
                slot = jnp.maximum(cell.makes_gradient, 0)
                carry = carry._replace(gradients=buffers.put(carry.gradients, (slot,), dy, when=cell.ends > 0))
                carry = carry._replace(outer_grads=self._added(carry.outer_grads, grads, ends.head_trained))
            batched = buffers.put(carry.sums.batched, (cell.microbatch,), sums.batched, when=cell.ends > 0)
            rest = jax.tree.map(jnp.add, carry.sums._replace(batched=[]), sums._replace(batched=[]))
            return carry._replace(sums=rest._replace(batched=batched))

        return jax.lax.fori_loop(0, self._turns(flag.ends, cell.ends), turn, carry)

    def _embedding(self, carry: Carry, cell: Cell, flag: Flags, batch: Any, dx: Arrays) -> Carry:
        """The embedding's gradient, where a backward pass has come to its end."""
        ends = self.job.ends
        if not ends.embed_trained:
            return carry

        def compute(outer: Arrays) -> Arrays:
            return ends.embed_grad(outer, batch, dx)

        def turn(_: Any, grads: Arrays) -> Arrays:
            return self._added(grads, self._alone(compute, cell.returns, ends.embed_leaves), ends.embed_trained)

        turns = self._turns(flag.returns, cell.returns)
        return carry._replace(outer_grads=jax.lax.fori_loop(0, turns, turn, carry.outer_grads))

    def _turns(self, some: Any, own: Any) -> Any:
        """How often a loop around an end runs: with collectives in it as often on every device."""
        return (some if self.job.sharing.in_ticks else own > 0).astype(jnp.int32)

    def _alone(self, compute: Callable[[Arrays], Any], own: Any, needed: Sequence[int]) -> Any:
        """`compute` on the device whose turn it is; zeros on others, where they come along for the collectives."""
        if not self.job.sharing.in_ticks:
            return compute(self.outer)
        outer = self._whole_outer(needed)
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute, outer))
        return jax.lax.cond(own > 0, lambda: compute(outer), zeros)

    def _added(self, totals: Arrays, grads: Arrays, chosen: Sequence[int]) -> Arrays:
        """`totals` of the trained outer leaves with gradients of some of them added."""
        if self.job.sharing.in_ticks:
            grads = self.job.sharing.reduce(grads, "outer", chosen)
        fresh = dict(zip(chosen, grads, strict=True))
        added = lambda total, index: total + fresh[index].astype(total.dtype) if index in fresh else total
        return [added(*item) for item in zip(totals, self.job.trained_outer, strict=True)]

    def _exchange(self, carry: Carry, cell: Cell, sent: Arrays) -> Carry:
        """To both neighbours; a device without a slot for what arrives drops it."""
        size = jax.lax.axis_size(AXIS)
        ring = [(i, (i + 1) % size) for i in range(size)]
        arrived = jax.lax.ppermute(sent, AXIS, ring)
        slot = cell.activation_arrives
        carry = carry._replace(activations=buffers.put(carry.activations, (jnp.maximum(slot, 0),), arrived, when=slot >= 0))
        if not self.job.trains:
            return carry
        arrived = jax.lax.ppermute(sent, AXIS, [(to, source) for source, to in ring])
        slot = cell.gradient_arrives
        return carry._replace(gradients=buffers.put(carry.gradients, (jnp.maximum(slot, 0),), arrived, when=slot >= 0))
