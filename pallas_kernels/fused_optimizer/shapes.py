"""Leaves that optimizers update: large ones of real models, and a model's many small ones."""

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "gpt2-124m": ((50304, 768), (1024, 768), *((12, *shape) for shape in ((768, 2304), (768, 768), (768, 3072), (3072, 768)))),
    "gpt2-124m small": tuple([(768,)] * 62 + [(2304,)] * 12 + [(3072,)] * 12),  # biases and norms, layers unrolled
    "gpt2-1.5b mlp": ((1600, 6400),),
    "llama-8b mlp": ((4096, 14336),),
    "llama-8b norms": tuple([(4096,)] * 65),
    "llama-70b mlp / 64": ((128, 28672),),
}
TWINS = {"matrix": ((24, 512),), "bucket": ((7, 33), (300,), (1, 256), ()), "one block": ((1, 128),)}
