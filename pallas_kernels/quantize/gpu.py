"""Block quantization on GPUs (Mosaic GPU): a warp reads a block and writes its codes."""

from functools import partial

from pallas_kernels.blocks import gpu
from pallas_kernels.quantize import body

quantize = partial(body.quantize, gpu.run)
dequantize = partial(body.dequantize, gpu.run)
