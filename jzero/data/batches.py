"""Training batches: windows of a token array, drawn by a pure function of (seed, step), so any step can be replayed."""

from collections.abc import Iterator

import numpy as np

from jzero._errors import explain


def batch_at(ids: np.ndarray, step: int, *, batch: int, seq: int, seed: int = 0) -> np.ndarray:
    """The batch of one step: int32[batch, seq + 1], inputs and targets overlapping by all but one token."""
    _check_size(ids, seq)
    starts = np.random.default_rng((seed, step)).integers(0, len(ids) - seq, size=batch)
    return np.stack([ids[start : start + seq + 1] for start in starts]).astype(np.int32)


def batches(
    ids: np.ndarray, *, batch: int, seq: int, vocab_size: int, seed: int = 0, first_step: int = 0
) -> Iterator[np.ndarray]:
    """Batches without end, from `first_step` on.

    Raises:
        ValueError: fewer ids than one window, or an id that `vocab_size` has no row for.
    """
    step = first_step
    while True:
        drawn = batch_at(ids, step, batch=batch, seq=seq, seed=seed)
        _check_vocab(drawn, vocab_size, step)
        yield drawn
        step += 1


def _check_size(ids: np.ndarray, seq: int) -> None:
    if len(ids) <= seq:
        raise ValueError(
            explain(
                "jzero.data",
                f"one window of {seq} tokens needs {seq + 1} ids",
                found=[f"ids: {ids.dtype}[{len(ids)}]"],
                context="Targets are the inputs shifted by one.",
                fix=f"Bring a longer text, or shorten the sequence to {max(len(ids) - 1, 1)}.",
            )
        )


def _check_vocab(drawn: np.ndarray, vocab_size: int, step: int) -> None:
    if drawn.min() < 0 or drawn.max() >= vocab_size:
        raise ValueError(
            explain(
                "jzero.data",
                f"ids must be in [0, {vocab_size})",
                found=[f"batch of step {step}: ids from {drawn.min()} to {drawn.max()}"],
                context=f"The model's vocabulary has {vocab_size} rows.",
                fix="Use the model these ids were made for, or a file tokenized for this one.",
            )
        )
