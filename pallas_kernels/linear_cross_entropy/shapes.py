"""Sizes of the heads of real models, for tests (as small twins), measurements and compilation."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One head: x[batch, length, dim], the vocabulary with its padding, and whether it is the embedding table [V, D]."""

    batch: int
    length: int
    dim: int
    vocab: int
    padded: int
    tied: bool

    def twin(self, length: int = 12, dim: int = 8, vocab: int = 21) -> "Shape":
        """The same arrangement, small enough for float64 on a CPU: padded if this one is, odd sizes."""
        return Shape(min(self.batch, 2), length, dim, vocab, vocab + 3 * (self.padded > self.vocab), self.tied)


SHAPES = {
    "gpt2-124m": Shape(8, 1024, 768, 50257, 50304, True),
    "gpt2-1.5b": Shape(4, 1024, 1600, 50257, 50304, True),
    "llama-8b": Shape(1, 8192, 4096, 128256, 128256, False),
    "llama-8b 4x2k": Shape(4, 2048, 4096, 128256, 128256, False),
    "llama-70b": Shape(1, 8192, 8192, 128256, 128256, False),
    "mixtral-8x7b": Shape(2, 4096, 4096, 32000, 32000, False),
    "rival 32k": Shape(4, 8192, 2560, 128256, 128256, False),  # the size that others published times for
}
