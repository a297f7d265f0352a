"""Collectives over the ZeRO axis, as the pass and the engines call them."""

from jzero.comm.plain import Auto as Auto
from jzero.comm.plain import Comm as Comm
from jzero.comm.plain import Manual as Manual
