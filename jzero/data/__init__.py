"""Real text without a download, token files, and deterministic training batches."""

from jzero.data.batches import batch_at as batch_at
from jzero.data.batches import batches as batches
from jzero.data.tokens import english as english
from jzero.data.tokens import load as load
