"""The loop: every contender sees the same batches; how turns are taken decides what the times can be compared with."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jzero.bench.contenders import Trial

_MOST_BYTES_SIDE_BY_SIDE = 4e9
_NUM_UNTIMED = 2  # first steps: caches, allocator, clocks

Prepare = Callable[[jax.Array], Trial]
Tick = Callable[[Trial | str], None]  # told after each step, and by name while a contender compiles


def run(
    prepare: dict[str, Prepare], draw: Callable[[], Iterator[jax.Array]], num_steps: int, *, side_by_side: bool, tick: Tick
) -> list[Trial]:
    """Train every contender for `num_steps`. Side by side they take turns step by step, else one after the other."""
    if side_by_side:
        trials = _prepared(prepare, draw, tick)
        for index, tokens in zip(range(num_steps), draw(), strict=False):
            turn = index % len(trials)  # another one goes first each time
            for trial in trials[turn:] + trials[:turn]:
                _advance(trial, tokens, tick)
        return trials
    return [_alone(name, make, draw, num_steps, tick) for name, make in prepare.items()]


def _prepared(prepare: dict[str, Prepare], draw: Callable[[], Iterator[jax.Array]], tick: Tick) -> list[Trial]:
    trials = []
    for name, make in prepare.items():
        tick(name)
        trials.append(make(next(draw())))
    return trials


def _alone(name: str, make: Prepare, draw: Callable[[], Iterator[jax.Array]], num_steps: int, tick: Tick) -> Trial:
    (trial,) = _prepared({name: make}, draw, tick)
    for _, tokens in zip(range(num_steps), draw(), strict=False):
        _advance(trial, tokens, tick)
    trial.state = None  # its memory is the next one's
    return trial


def _advance(trial: Trial, tokens: jax.Array, tick: Tick) -> None:
    start = time.perf_counter()
    trial.state, loss = trial.step(trial.state, tokens)
    jax.block_until_ready(trial.state)
    trial.seconds.append(time.perf_counter() - start)
    trial.losses.append(float(loss))
    tick(trial)


def fits_side_by_side(num_params: int, num_devices: int, num_trials: int) -> bool:
    """Whether so many replicated copies of parameters, moments and gradients are little enough for simulated devices."""
    return 16 * num_params * num_devices * num_trials <= _MOST_BYTES_SIDE_BY_SIDE


def timed(seconds: list[float]) -> list[float]:
    """Without the first steps, as far as there are others."""
    return seconds[min(_NUM_UNTIMED, len(seconds) - 1) :]


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    ordered = sorted(second * 1e3 for second in timed(seconds))
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "min": ordered[0], "max": ordered[-1]}


def versions() -> dict[str, Any]:
    """What a number depends on besides the hardware."""
    import platform
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }
