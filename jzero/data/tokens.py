"""Text and token files as one flat array of ids. Text becomes bytes: ids 0 to 255, every vocabulary has room for them."""

from pathlib import Path

import numpy as np

from jzero._errors import explain

# karpathy/llm.c, dev/data/data_common.py: 256 int32 of header (magic, version, number of tokens), then the ids.
_LLMC_DTYPES = {20240520: np.uint16, 20240801: np.uint32}
_LLMC_HEADER_BYTES = 1024


def english() -> np.ndarray:
    """0.5 to 0.7 MB of English prose that every Python brings along: the documentation topics of its standard library."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return np.frombuffer(text.encode(), np.uint8)


def load(path: str | Path | None = None) -> np.ndarray:
    """The ids in a file, memory-mapped where the format allows.

    `.npy` holds a one-dimensional integer array. `.bin` holds uint16 ids (nanoGPT), or what the header of an llm.c
    file says. Anything else is UTF-8 text, one id per byte. None is `english()`.

    Raises:
        ValueError: no such file, not UTF-8, or not a flat array of integers.
    """
    if path is None:
        return english()
    path = Path(path)
    if not path.is_file():
        raise _unreadable(path, "there is no such file", "Name a UTF-8 text file, or token ids as .npy or .bin.")
    return {".npy": _load_npy, ".bin": _load_bin}.get(path.suffix, _load_text)(path)


def _load_npy(path: Path) -> np.ndarray:
    ids = np.load(path, mmap_mode="r")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise _unreadable(path, f"it holds {ids.dtype}{list(ids.shape)}", "Save one flat array of integers with numpy.save.")
    return ids


def _load_bin(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic in _LLMC_DTYPES:
        return np.memmap(path, _LLMC_DTYPES[magic], "r", offset=_LLMC_HEADER_BYTES)
    return np.memmap(path, np.uint16, "r")


def _load_text(path: Path) -> np.ndarray:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error), "Convert it to UTF-8, or save token ids as .npy or .bin.") from None
    return np.frombuffer(content, np.uint8)


def _unreadable(path: Path, reason: str, fix: str) -> ValueError:
    return ValueError(
        explain(
            "jzero.data",
            "expected a file of text or token ids",
            found=[f"{path}: {reason}"],
            context="Text is UTF-8; .npy is a flat integer array; .bin is uint16, or has an llm.c header.",
            fix=fix,
        )
    )
