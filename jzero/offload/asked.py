"""`jzero.Offload`: which part of a step rests off the device, checked when it is written."""

import os
from dataclasses import dataclass
from typing import NamedTuple

from jzero._errors import explain, suggest

WHO = "jzero.Offload"
HOST, NVME = KINDS = ("host", "nvme")
DEVICE, AUTO = "device", "auto"
UPDATES = (DEVICE, HOST, AUTO)
FETCHES = STEP, USE = ("step", "use")


class Place(NamedTuple):
    """Where something rests: `"host"`, or `"nvme:FOLDER"`."""

    kind: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.folder}" if self.folder else self.kind


@dataclass(frozen=True)
class Offload:
    """What rests off the device between its uses, for `jzero.shard(..., offload=Offload(...))`.

    Everything for a step of `jzero.make_train_step`; for any other step state in host memory.

    Args:
      opt_state: the optimizer's arrays: `"host"` (pinned host memory), `"nvme:FOLDER"` or None (the device).
      params: the parameters at rest, which are the fp32 masters: likewise. In files they and `opt_state` may share a folder.
      activations: what the forward pass saves for the backward pass: `"host"` or None.
      fraction: of the bytes of `opt_state` and `params` that go; the rest stays on the device. Whole leaves stay: those
        whose moving costs most time per byte, which are the smallest, and then as many as fit.
      bucket_bytes: per device, how much arrives, is updated and leaves at a time. None derives it from the largest leaf and
        free memory (`jzero/offload/buckets.py`).
      update: where the update of what is offloaded is computed. `"device"`: moments and masters come to it and go back.
        `"host"`: they stay, the host's processors compute, and only gradients leave the device and parameters that rest there
        come back; for updates without a collective (`jzero/engine/computing.py`). `"auto"`: where link and processors, timed,
        say it takes less time.
      fetch: when parameters in host memory come to the device. `"step"`: all of a device's shards when a step begins, in the
        compute dtype. `"use"`: at each use, layer by layer, in the forward and in the backward pass of every microbatch, and
        their gradients leave for host memory as they appear (`jzero/gather/away.py`); for stage 3.

    Raises:
      ValueError, TypeError: a place that is none, a fraction outside 0..1, a setting without effect.

    Example:
      >>> Offload(opt_state="host", fraction=0.8).place_of("opt_state")
      Place(kind='host', folder='')
    """

    opt_state: str | None = None
    params: str | None = None
    activations: str | None = None
    fraction: float = 1.0
    bucket_bytes: int | None = None
    update: str = DEVICE
    fetch: str = STEP

    def __post_init__(self) -> None:
        places = {name: parse(name, getattr(self, name)) for name in ("opt_state", "params", "activations")}
        if not any(places.values()):
            fix = 'Write jzero.Offload(opt_state="host"), or leave offload= out.'
            found = ["opt_state, params and activations are None"]
            raise ValueError(explain(WHO, "nothing is offloaded", found=found, fix=fix))
        activations = places["activations"]
        if activations is not None and activations.kind != HOST:
            fix = 'Write activations="host".'
            found = [f"activations={self.activations!r}"]
            raise ValueError(explain(WHO, "activations go to host memory alone", found=found, fix=fix))
        self._check_numbers(any(places[name] for name in ("opt_state", "params")))

    def _check_numbers(self, has_state: bool) -> None:
        fraction, size = self.fraction, self.bucket_bytes
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            fix = "1.0 moves all of it, 0.8 keeps a fifth of the bytes on the device; for nothing leave offload= out."
            raise ValueError(explain(WHO, "fraction= is above 0 and at most 1", found=[f"fraction={fraction!r}"], fix=fix))
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            fix = "A number of bytes per device, such as 256 * 2**20, or None."
            found = [f"bucket_bytes={size!r}"]
            raise ValueError(explain(WHO, "bucket_bytes= is a positive whole number", found=found, fix=fix))
        if self.update not in UPDATES:
            found, context = [f"update={self.update!r}"], suggest(str(self.update), UPDATES)
            fix = 'Write update="host", or update="auto" to have it measured.'
            raise ValueError(explain(WHO, "update= is 'device', 'host' or 'auto'", found=found, context=context, fix=fix))
        if self.fetch not in FETCHES:
            found, context = [f"fetch={self.fetch!r}"], suggest(str(self.fetch), FETCHES)
            fix = 'Write fetch="use" to have parameters come layer by layer, or leave it out.'
            raise ValueError(explain(WHO, "fetch= is 'step' or 'use'", found=found, context=context, fix=fix))
        params = self.place_of("params")
        if self.fetch != STEP and (params is None or params.kind != HOST):
            found, fix = [f"fetch={self.fetch!r} with params={self.params!r}"], 'Write params="host" too, or leave it out.'
            raise ValueError(explain(WHO, "fetch= is about parameters in host memory", found=found, fix=fix))
        idle = [f"fraction={fraction!r}"] * (fraction != 1) + [f"bucket_bytes={size!r}"] * (size is not None)
        idle += [f"update={self.update!r}"] * (self.update != DEVICE)
        if idle and not has_state:
            fix = "They are about opt_state= and params=; activations go as the remat policy says."
            raise ValueError(explain(WHO, "a setting would have no effect", found=idle, fix=fix))

    def place_of(self, role: str) -> Place | None:
        """Where leaves of a role (or `"activations"`) rest; None is the device."""
        return parse(role, getattr(self, role, None))

    def __str__(self) -> str:
        set_here = [name for name, field in self.__dataclass_fields__.items() if getattr(self, name) != field.default]
        return f"Offload({', '.join(f'{name}={getattr(self, name)!r}' for name in set_here)})"


def parse(name: str, text: str | None) -> Place | None:
    """`"host"` or `"nvme:FOLDER"` as a `Place`."""
    if text is None:
        return None
    if not isinstance(text, str):
        fix = 'Write "host", or "nvme:/data/swap".'
        raise TypeError(explain(WHO, f"{name}= is a place's name", found=[f"{name}={text!r}"], fix=fix))
    kind, colon, folder = text.partition(":")
    if kind not in KINDS or (kind == HOST and colon):
        found, fix = [f"{name}={text!r}"], 'Write "host", or "nvme:/data/swap".'
        raise ValueError(explain(WHO, f"{name}= names no place", found=found, context=suggest(kind, KINDS), fix=fix))
    if kind == NVME and not folder:
        fix = 'Write "nvme:/data/swap", a folder on the disk that is to hold the files.'
        raise ValueError(explain(WHO, f"{name}= names no folder", found=[f"{name}={text!r}"], fix=fix))
    return Place(kind, os.path.normpath(folder) if folder else "")
