"""`python -m jzero.bench`: plain JAX and the ZeRO stages side by side, training on real text."""
