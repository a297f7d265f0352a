"""Arrays that real models quantize: gradients and moments as (rows, width), whole or a shard's part."""

SHAPES = {
    "gpt2-124m mlp": (768, 3072),
    "gpt2-1.5b mlp": (1600, 6400),
    "llama-8b mlp": (4096, 14336),
    "llama-8b mlp / 64": (64, 14336),
    "llama-70b mlp": (8192, 28672),
}
TWINS = {"gpt2-124m mlp": (24, 768), "llama-8b mlp": (40, 1792), "one block": (1, 256), "odd": (13, 300)}
