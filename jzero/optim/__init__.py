"""Optimizers in less memory: moments in 8 bits or in bfloat16, around any optax transformation; AdamW and Lion in one pass."""

from jzero.optim.bf16 import moments_bf16 as moments_bf16
from jzero.optim.eight_bit import moments_8bit as moments_8bit
from jzero.optim.fused import fused_adamw as fused_adamw
from jzero.optim.fused import fused_lion as fused_lion
