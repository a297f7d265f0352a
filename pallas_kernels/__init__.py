"""Kernels for training on GPUs and TPUs, one folder per operation; imports jax only.

Every operation takes `implementation=None`, which chooses by device, shape and dtype, or a name, which insists.
"""

from pallas_kernels.attention import attention as attention
from pallas_kernels.dispatch import Choice as Choice
from pallas_kernels.dispatch import by_definition as by_definition
from pallas_kernels.dispatch import disabled as disabled
from pallas_kernels.dispatch import found_in as found_in
from pallas_kernels.dispatch import interpreted as interpreted
from pallas_kernels.dispatch import recording as recording
from pallas_kernels.dispatch import target as target
from pallas_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.linear_cross_entropy import linear_cross_entropy_sum as linear_cross_entropy_sum
