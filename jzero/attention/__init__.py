"""Attention over sequences that a mesh axis splits: exchange of heads (Ulysses) or a ring, and the plain form they equal."""

from jzero.attention.main import KINDS as KINDS
from jzero.attention.main import Kind as Kind
from jzero.attention.main import attention as attention
from jzero.attention.place import split_sequence as split_sequence
from jzero.attention.plain import Attention as Attention
from jzero.attention.plain import attend as attend
from jzero.attention.plain import choose_attention as choose_attention
