"""The programs that the pass must not change, as users write them: losses, and whole train steps.

`LOSSES` run in both engines; `STEPS`, whole train steps, in the opaque one. A loss that is expected to stay global, since its
examples meet or cannot be followed, says `meets=True`. Every size is a multiple of 3 and of 8, save where a program is about
that. A module enters its programs when it is imported, so the order of the imports is the order of the tables.
"""

from programs import derivatives, values, views, control, remat, outside, steps  # noqa: F401, I001
from programs.steps import NORMALISING as NORMALISING
from programs.table import LOSSES as LOSSES
from programs.table import STACK as STACK
from programs.table import STEPS as STEPS
from programs.table import Loss as Loss
from programs.table import W as W
from programs.table import batch as batch
