"""`jzero.doctor()` and `python -m jzero.doctor`: what this machine has, what it lacks, and how to get it."""

from jzero.doctor.diagnosis import Diagnosis as Diagnosis
from jzero.doctor.diagnosis import doctor as doctor
