"""`jzero.plan(...)` and `python -m jzero.plan`: what a run would need of devices that are not there."""

from jzero.plan.own import plan as plan
