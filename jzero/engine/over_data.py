"""How a pipeline's parameters are held over `data` while its table runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jzero.comm import Manual


@dataclass(frozen=True)
class OverData:
    """How the executor's parameters are held over `data`: `splits` per leaf, without the layer dim for a stack's layers."""

    gathers: bool
    reduces: bool
    splits: dict[str, list[Any]]  # "layer" and "outer" -> per leaf its split, None where it is whole anyway
    comm: Manual
    dtype: Any  # of gradients on the wire

    @property
    def in_ticks(self) -> bool:
        return any(split for splits in self.splits.values() for split in splits) and (self.gathers or self.reduces)

    def gather(self, shards: Sequence[Any], part: str) -> list[Any]:
        own = self.splits[part]
        extra = shards[len(own) :]  # a number that the executor adds
        needs = lambda shard, split: self.gathers and split and shard is not None
        pairs = zip(shards[: len(own)], own, strict=True)
        return [*(self.comm.gather(shard, split) if needs(shard, split) else shard for shard, split in pairs), *extra]

    def reduce(self, grads: Sequence[Any], part: str, chosen: Sequence[int]) -> list[Any]:
        pairs = zip(grads, (self.splits[part][index] for index in chosen), strict=True)
        return [self.comm.reduce(grad, split, self.dtype) if self.reduces and split else grad for grad, split in pairs]
