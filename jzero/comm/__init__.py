"""Collectives over ZeRO's axes and over the batch, as the pass, the engines and losses call them."""

from jzero.comm.over_batch import manual_batch_axes as manual_batch_axes
from jzero.comm.over_batch import over_batch_mean as over_batch_mean
from jzero.comm.plain import Auto as Auto
from jzero.comm.plain import Comm as Comm
from jzero.comm.plain import Manual as Manual
