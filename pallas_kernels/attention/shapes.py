"""Sizes of the attention of real models, for tests (as small twins), measurements and compilation."""

from typing import NamedTuple


class Shape(NamedTuple):
    """q[batch, length, heads, head_dim], keys and values with their own heads."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    soft_cap: float | None = None

    def twin(self, length: int, chunk: int = 1) -> "Shape":
        """The same arrangement, small: as many queries to a key-value head, a window of a third of the length."""
        groups = min(self.num_heads // self.num_kv_heads, 3)
        window = None if self.sliding_window is None else max(length // 3, 1)
        return Shape(2, length, 2 * groups, 2, min(self.head_dim, 8 * chunk), window, self.soft_cap)


SHAPES = {
    "gpt2-124m": Shape(8, 1024, 12, 12, 64),
    "gpt2-1.5b": Shape(4, 1024, 25, 25, 64),
    "llama-8b": Shape(1, 8192, 32, 8, 128),
    "llama-8b 4x2k": Shape(4, 2048, 32, 8, 128),
    "llama-70b": Shape(1, 8192, 64, 8, 128),
    "mixtral-8x7b": Shape(1, 8192, 32, 8, 128, sliding_window=4096),
    "gemma-2-9b": Shape(1, 8192, 16, 8, 256, sliding_window=4096, soft_cap=50.0),
}
