"""Text, token files and batches."""

import itertools

import numpy as np
import pytest

from jzero import data


def test_standard_library_text_is_english_and_large():
    ids = data.english()
    assert len(ids) > 400_000
    assert b" the " in ids.tobytes()


def test_a_batch_is_a_pure_function_of_seed_and_step():
    ids = data.english()
    first = data.batch_at(ids, 7, batch=4, seq=16, seed=3)
    assert first.shape == (4, 17)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, data.batch_at(ids, 7, batch=4, seq=16, seed=3))
    assert (first != data.batch_at(ids, 8, batch=4, seq=16, seed=3)).any()
    assert (first != data.batch_at(ids, 7, batch=4, seq=16, seed=4)).any()


def test_batches_can_start_anywhere():
    ids = data.english()
    stream = data.batches(ids, batch=2, seq=8, vocab_size=256, seed=1)
    later = data.batches(ids, batch=2, seq=8, vocab_size=256, seed=1, first_step=2)
    np.testing.assert_array_equal(list(itertools.islice(stream, 3))[2], next(later))


def test_windows_are_contiguous_and_reach_the_last_id():
    ids = np.arange(12, dtype=np.uint16)
    drawn = np.concatenate([data.batch_at(ids, step, batch=8, seq=3) for step in range(20)])
    assert (np.diff(drawn, axis=1) == 1).all()
    assert (drawn.min(), drawn.max()) == (0, 11)


def test_text_file_is_bytes(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("ZeRO é", encoding="utf-8")
    assert data.load(path).tobytes() == "ZeRO é".encode()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_npy_ids(tmp_path, dtype):
    np.save(tmp_path / "ids.npy", np.arange(50, dtype=dtype))
    np.testing.assert_array_equal(data.load(tmp_path / "ids.npy"), np.arange(50))


def test_bin_ids_with_and_without_llmc_header(tmp_path):
    raw, headed = tmp_path / "raw.bin", tmp_path / "headed.bin"
    np.arange(50, dtype=np.uint16).tofile(raw)
    header = np.zeros(256, np.int32)
    header[:3] = 20240801, 7, 50
    headed.write_bytes(header.tobytes() + np.arange(50, dtype=np.uint32).tobytes())
    np.testing.assert_array_equal(data.load(raw), np.arange(50))
    np.testing.assert_array_equal(data.load(headed), np.arange(50))


def test_errors_say_what_is_wrong(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    np.save(tmp_path / "floats.npy", np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"no such file"):
        data.load(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"utf-8"):
        data.load(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"float64\[2, 3\]"):
        data.load(tmp_path / "floats.npy")
    with pytest.raises(ValueError, match=r"needs 9 ids"):
        data.batch_at(np.arange(8), 0, batch=1, seq=8)
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        next(data.batches(np.full(20, 300), batch=1, seq=8, vocab_size=256))
