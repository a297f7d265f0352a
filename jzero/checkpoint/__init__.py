"""Checkpoints on Orbax: written at any stage and mesh, restored onto any other, readable without jzero."""

from jzero.checkpoint.manager import CheckpointManager as CheckpointManager
from jzero.checkpoint.once import restore as restore
from jzero.checkpoint.once import save as save
from jzero.checkpoint.tensors import export as export
