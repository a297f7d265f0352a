"""Compiled programs read from their HLO text: what moves between devices, between which, and how often per step."""

from jzero.hlo.collectives import Collective as Collective
from jzero.hlo.collectives import collectives as collectives
from jzero.hlo.groups import Groups as Groups
from jzero.hlo.groups import axis_of as axis_of
from jzero.hlo.groups import decode as decode
from jzero.hlo.groups import group_size as group_size
from jzero.hlo.host import host_transfers as host_transfers
from jzero.hlo.liveness import Buffer as Buffer
from jzero.hlo.liveness import Liveness as Liveness
from jzero.hlo.liveness import liveness as liveness
from jzero.hlo.meaning import Kind as Kind
from jzero.hlo.text import Computation as Computation
from jzero.hlo.text import Instruction as Instruction
from jzero.hlo.text import Module as Module
from jzero.hlo.text import Shape as Shape
from jzero.hlo.text import attribute as attribute
from jzero.hlo.text import bits as bits
from jzero.hlo.text import parse as parse
from jzero.hlo.text import value_after as value_after
