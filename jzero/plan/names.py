"""What the command line writes in one word: a model with changes, counts of tokens, bytes, and what rests off the device."""

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING
from functools import cache
from typing import Any

from jzero._errors import explain, suggest
from jzero.models import ModelConfig, preset
from jzero.offload import Offload

WHO = "jzero.plan"
VOCAB_MULTIPLE = 128  # as the bench pads: 50304 divides where 50257 does not
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_BYTES = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}


@cache
def config_of(model: str) -> ModelConfig:
    """`"llama-8b"`, or with fields replaced `"llama-8b,num_layers=40,dim=5120"`.

    Raises:
      ValueError: no such preset or field, or a field that is not given a number.
    """
    name, *changes = model.split(",")
    pairs = [change.partition("=") for change in changes]
    wrong = [change for change, (_, _, value) in zip(changes, pairs, strict=True) if not _is_number(value.strip())]
    if wrong:
        fix = "Write llama-8b,num_layers=40: a preset's name and numbers for fields of its config."
        raise ValueError(explain(WHO, "a model's fields are name=number", found=wrong, context=f"--model {model}", fix=fix))
    number = lambda text: int(text) if text.strip().isdigit() else float(text)
    return preset(name, **{field.strip(): number(value) for field, _, value in pairs})


@cache
def padded(model: str) -> ModelConfig:
    """The config with its vocabulary padded; a search asks thousands of times."""
    config = config_of(model)
    rows = config.padded_vocab_size or math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return config_of(f"{model},padded_vocab_size={rows}")


def python_of(model: str) -> str:
    """The call of `jzero.models.build` that makes it, open for more arguments."""
    name, *changes = model.split(",")
    return ", ".join([f'models.build("{name}"', *changes, f"padded_vocab_size={padded(model).padded_vocab_size}"])


def count(text: str) -> int:
    """`"64M"` -> 67108864: k, M and G are powers of 1,024, as sequence lengths are."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", _plain(text))
    number = float(match[1]) * _UNITS[match[2]] if match else 0
    if not match or number != int(number):
        fix = "Write a whole number, or one with k, M or G (powers of 1,024): 4194304, 4M."
        raise ValueError(explain(WHO, "not a number of tokens", found=[f"{text!r}"], fix=fix))
    return int(number)


def num_bytes(text: str) -> int:
    """`"128GB"` -> 128000000000: powers of 1,000, as memory and drives are sold."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", _plain(text))
    if not match:
        fix = "Write 128GB, 1TB or 1.5e12 as 1500GB: k, M, G and T are powers of 1,000."
        raise ValueError(explain(WHO, "not a number of bytes", found=[f"{text!r}"], fix=fix))
    return int(float(match[1]) * _BYTES[match[2]])


def offload(text: str) -> Offload:
    """`"opt_state=host,params=host,fraction=0.8"` as the value that `jzero.shard(offload=)` takes.

    Raises:
      ValueError, TypeError: no such field, or what `jzero.Offload` refuses.
    """
    fields = list(Offload.__dataclass_fields__)
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in fields or not value:
            wrong = [f"--offload {text}: {part!r}"]
            fix = "Write --offload opt_state=host,params=host,activations=host,fraction=0.8, or opt_state=nvme:/data/swap."
            raise ValueError(explain(WHO, "offload is field=place", found=wrong, context=suggest(name, fields), fix=fix))
        found[name] = float(value) if name == "fraction" and _is_number(value) else value
        found[name] = num_bytes(value) if name == "bucket_bytes" else found[name]
    return Offload(**found)


def said_of(offload: Offload) -> str:
    """The same the other way."""
    return ",".join(f"{name}={value}" for name, value in fields_of(offload).items())


def fields_of(offload: Offload) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    fields = offload.__dataclass_fields__.items()
    return {name: getattr(offload, name) for name, one in fields if getattr(offload, name) != _default(one)}


def _default(field: Any) -> Any:
    return None if field.default is MISSING else field.default


def _plain(text: str) -> str:
    return text.strip().lower().replace(",", "").replace("_", "")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+", text) is not None


def divisors(number: int) -> list[int]:
    """Small ones first."""
    return [one for one in range(1, number + 1) if number % one == 0]


def listed(sizes: Sequence[int]) -> str:
    """Sizes of an axis above 1, as an error lists them."""
    return ", ".join(str(one) for one in sizes if one > 1) or "none"
