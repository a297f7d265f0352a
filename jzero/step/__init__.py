"""What a train step computes: loss, gradient, accumulation, scaling, update. Pure functions, no mesh."""

from jzero.step.batch import pad_batch as pad_batch
from jzero.step.loss import Summed as Summed
from jzero.step.loss import Weighted as Weighted
from jzero.step.loss import summed as summed
from jzero.step.loss import weighted as weighted
from jzero.step.state import LossScaleState as LossScaleState
from jzero.step.state import TrainState as TrainState
from jzero.step.train_step import TrainStep as TrainStep
from jzero.step.train_step import make_train_step as make_train_step
from jzero.step.update import check as check
