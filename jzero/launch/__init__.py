"""Jobs of several processes: start them, join them, end them together, start them again (`python -m jzero.launch --help`)."""

from jzero.launch.codes import FAILED_TO_STEP as FAILED_TO_STEP
from jzero.launch.codes import PREEMPTED as PREEMPTED
from jzero.launch.join import initialize as initialize
