"""Optimizers in less memory: moments in 8 bits or in bfloat16, around any optax transformation."""

from jzero.optim.bf16 import moments_bf16 as moments_bf16
from jzero.optim.eight_bit import moments_8bit as moments_8bit
