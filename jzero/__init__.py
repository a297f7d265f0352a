"""jzero: ZeRO stages 0 to 3 for any JAX train step, in one line, proved on the compiled program.

>>> train_step = jzero.shard(train_step, stage=3)  # doctest: +SKIP
"""

from jzero import optim as optim
from jzero._errors import StageNotAchieved as StageNotAchieved
from jzero.attention import attention as attention
from jzero.attention import split_sequence as split_sequence
from jzero.checkpoint import CheckpointManager as CheckpointManager
from jzero.checkpoint import export as export
from jzero.checkpoint import restore as restore
from jzero.checkpoint import save as save
from jzero.comm import over_batch_mean as over_batch_mean
from jzero.doctor import doctor as doctor
from jzero.mesh import make_mesh as make_mesh
from jzero.offload import Offload as Offload
from jzero.offload import offload_states as offload_states
from jzero.offload import reload_states as reload_states
from jzero.pipeline import schedules as schedules
from jzero.pipeline.model import Pipeline as Pipeline
from jzero.plan import plan as plan
from jzero.precision import PrecisionPolicy as PrecisionPolicy
from jzero.report import Report as Report
from jzero.shard import ShardedStep as ShardedStep
from jzero.shard import shard as shard
from jzero.step import TrainState as TrainState
from jzero.step import TrainStep as TrainStep
from jzero.step import check as check
from jzero.step import make_train_step as make_train_step
from jzero.step import pad_batch as pad_batch
from jzero.step import summed as summed
from jzero.step import weighted as weighted
from jzero.tiled import tiled as tiled
from jzero.topology import topology as topology
from jzero.verify import verify as verify
