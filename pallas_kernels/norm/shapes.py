"""Rows that real models normalise: (tokens on a device, width)."""

SHAPES = {
    "gpt2-124m": (8192, 768),
    "gpt2-1.5b": (4096, 1600),
    "llama-1b": (8192, 2048),
    "llama-8b": (8192, 4096),
    "llama-70b": (8192, 8192),
}
TWINS = {"gpt2-124m": (13, 384), "llama-8b": (40, 256), "one row": (1, 128)}
