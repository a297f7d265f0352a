"""GPT-2, Llama and Mixtral in flax nnx, as pure functions over plain dicts of parameters."""

from jzero.models.build import FLOPS_FORMULA as FLOPS_FORMULA
from jzero.models.build import Model as Model
from jzero.models.build import build as build
from jzero.models.build import count_params as count_params
from jzero.models.build import stack as stack
from jzero.models.build import unstack as unstack
from jzero.models.config import PRESETS as PRESETS
from jzero.models.config import GPT2Config as GPT2Config
from jzero.models.config import LlamaConfig as LlamaConfig
from jzero.models.config import MixtralConfig as MixtralConfig
from jzero.models.config import ModelConfig as ModelConfig
from jzero.models.config import RopeScaling as RopeScaling
from jzero.models.config import preset as preset
from jzero.models.pipeline import pipeline as pipeline
