"""Gather at use: the pass that makes a sharded parameter whole where it is used, and nowhere else."""

from jzero.gather.composed import differentiable as differentiable
from jzero.gather.constraints import constraints_on as constraints_on
from jzero.gather.facts import Fact as Fact
from jzero.gather.opaque import constrained as constrained
