"""Metrics of a run: a progress line, a JSONL file and TensorBoard events. A resumed run writes no line twice."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jzero._errors import explain

WHO = "jzero.monitor"
FILE = "metrics.jsonl"


class Monitor:
    """Where the numbers of a training run go.

    `write(i, metrics)` reads the values one call later, so the device need not be waited for; `flush` reads them now. Call it
    before a checkpoint is saved: then a run that is killed and resumed from there has every line up to it.

    Args:
      folder: made if it is not there; `metrics.jsonl` and TensorBoard's event files go into it.
      first_step: lines of this step and later ones, which a killed run wrote after its last checkpoint, are dropped.
      num_steps: shown in the progress line.
      tensorboard: write event files too, with tensorboardX.
      every: seconds between progress lines where standard error is no terminal.

    Raises:
      ImportError: tensorboardX is not installed. OSError: the folder cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> folder = tempfile.mkdtemp()
      >>> with Monitor(folder, tensorboard=False, every=60.0) as monitor:
      ...     monitor.write(1, {"loss": jax.numpy.float32(2.5)})
      >>> pathlib.Path(folder, "metrics.jsonl").read_text()
      '{"step": 1, "loss": 2.5}\\n'
    """

    def __init__(
        self, folder: str | Path, *, first_step: int = 0, num_steps: int | None = None, tensorboard: bool = True,
        every: float = 10.0,
    ):  # fmt: skip
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._num_steps, self._every = num_steps, every
        self._is_writer = jax.process_index() == 0
        self._last = (time.monotonic(), first_step - 1)  # of the last progress line
        if not self._is_writer:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _drop_from(folder / FILE, first_step)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        self._events = _events(folder, first_step) if tensorboard else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, i: int, metrics: dict[str, Any]) -> None:
        """Scalars of step `i` under their names. What is not a scalar is left out; nested dicts are joined by slashes."""
        pending, self._pending = self._pending, (i, metrics)
        self._put(pending)

    def flush(self) -> None:
        """Write what `write` was given last. Waits for the step that computes it."""
        pending, self._pending = self._pending, None
        self._put(pending)
        if self._is_writer and self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush, and close the files."""
        self.flush()
        if self._is_writer:
            if sys.stderr.isatty():
                print(file=sys.stderr)
            self._file.close()
            if self._events is not None:
                self._events.close()

    def _put(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        if pending is None or not self._is_writer:
            return
        i, values = pending[0], _scalars(pending[1])
        self._file.write(json.dumps({"step": i, **values}) + "\n")
        self._file.flush()  # then the system has it, whatever becomes of this process
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, i)
        self._progress(i, values)

    def _progress(self, i: int, values: dict[str, float]) -> None:
        now, (before, last) = time.monotonic(), self._last
        is_last, on_terminal = i == self._num_steps, sys.stderr.isatty()
        if i == last or (now - before < (0.2 if on_terminal else self._every) and not is_last):
            return
        self._last = (now, i)
        of = "" if self._num_steps is None else f"/{self._num_steps}"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:4])
        rate = f"{(now - before) / (i - last):.3g} s/step"
        print(f"\r\x1b[K{i}{of}  {shown}  {rate}" if on_terminal else f"step {i}{of}  {shown}  {rate}",
              end="" if on_terminal else "\n", file=sys.stderr, flush=True)  # fmt: skip


def _scalars(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flat, as Python numbers; NaN and infinity stay, as JSON's readers in Python and JavaScript's JSON5 know them."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _scalars(value, f"{prefix}{name}/")
        elif value is not None and np.ndim(value) == 0:
            found[f"{prefix}{name}"] = np.asarray(value).item()
    return found


def _drop_from(file: Path, first_step: int) -> None:
    """Keep the lines of steps before `first_step`; a last line that was cut off goes too."""
    if not file.exists():
        return
    kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if _is_before(line, first_step)]
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)


def _is_before(line: str, first_step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] < first_step
    except (ValueError, KeyError, TypeError):
        return False


def _events(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        fix = 'pip install "jzero[train]", or pass tensorboard=False; metrics.jsonl is written in any case.'
        raise ImportError(explain(WHO, "tensorboardX is not installed", found=[str(error)], fix=fix)) from error
    return SummaryWriter(str(folder), purge_step=first_step or None)
