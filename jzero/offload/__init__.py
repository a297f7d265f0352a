"""What does not fit on the device: where it rests, and how it comes and goes while a step runs.

`asked.py` is what the user writes, `tier.py` what a place must be able to do, `host.py` the first such place.
"""

from jzero.offload.asked import Offload as Offload
from jzero.offload.states import offload_states as offload_states
from jzero.offload.states import reload_states as reload_states
from jzero.offload.tier import Tier as Tier
from jzero.offload.tier import tier as tier
