"""From leaves to specs: `place` for the state, `batch_spec` and `check_batch` for the batch."""

from jzero.rules.batch import batch_spec as batch_spec
from jzero.rules.batch import check_batch as check_batch
from jzero.rules.placing import place as place
from jzero.rules.stacked import stacked_dims as stacked_dims
