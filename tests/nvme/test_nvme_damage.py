"""Files that are whole or named as damaged: a step that meets one fails and leaves the state."""

import os
import shutil

import numpy as np
import pytest
from swapped import batch, make_state, shard_file, train

from jzero.offload.nvme import swap
from jzero.offload.nvme.shard_file import CorruptSwap


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "damage", ["flipped", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("missing", marks=pytest.mark.slow)]
)
def test_a_damaged_file_fails_the_step_and_is_named(step, damage):
    state, _ = train(step, make_state(step), 2)
    leaf = state.opt_state[0].nu["w2"]
    file, params = shard_file(leaf, 5), np.asarray(state.params["w2"])
    payload = leaf.swap.slot(file) * file.slot_bytes + file.header_bytes
    if damage == "flipped":
        flip(file.path, payload + 17)
    elif damage == "truncated":
        os.truncate(file.path, payload)
    else:
        file.path.unlink()
    with pytest.raises(CorruptSwap, match=rf"(?s)not what was written.*{file.path.name}.*nu/w2.*Restore a checkpoint"):
        step(state, batch())
    np.testing.assert_array_equal(state.params["w2"], params)  # not donated: the step failed
    assert not state.opt_state[0].mu["w0"].is_deleted()
    with pytest.raises(CorruptSwap):
        np.asarray(leaf)
    with pytest.raises((CorruptSwap, FileNotFoundError)):
        leaf.swap.verify()


def test_a_swap_opens_again_only_as_it_was_left(tmp_path, step):
    state, _ = train(step, make_state(step), 3)
    made = state.opt_state[0].mu["w0"].swap
    found = swap.opened(made.folder, made.leaves)
    assert (found.generation, found.step) == (3, 3)
    file = made.files[0][0]
    copy = tmp_path / "copy"

    def damaged(change):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made.folder, copy)
        change(copy / file.path.name)

    slot_of_the_past, slot = (one * file.slot_bytes for one in (found.next_slot(file), found.slot(file)))
    damaged(lambda path: flip(path, slot_of_the_past + file.header_bytes))
    swap.opened(copy, made.leaves)  # a flip in the slot that does not count harms nobody
    for change in (
        lambda path: flip(path, slot + 60),
        lambda path: flip(path, slot + file.header_bytes),
        lambda path: flip(path.parent / swap.COMMIT, 40),
        lambda path: (path.parent / swap.COMMIT).unlink(),
        lambda path: os.truncate(path, file.slot_bytes),
        lambda path: shutil.copy(made.files[0][1].path, path),  # another shard's file
    ):
        damaged(change)
        with pytest.raises((CorruptSwap, FileNotFoundError)):
            swap.opened(copy, made.leaves)
    with pytest.raises(ValueError, match="another run"):
        swap.opened(made.folder, made.leaves[:-1])


@pytest.mark.slow
def test_generations_are_never_mixed(step):
    """One file of the generation before, under the name of this one."""
    state, _ = train(step, make_state(step), 3)
    made = state.opt_state[0].mu["w0"].swap
    file = made.files[2][3]
    with file.path.open("r+b") as opened:
        content = opened.read()
        old, new = (slot(file) * file.slot_bytes for slot in (made.next_slot, made.slot))
        opened.seek(new)
        opened.write(content[old : old + file.slot_bytes])
    with pytest.raises(CorruptSwap, match=r"generation 2 of step 2, committed is generation 3 of step 3"):
        swap.opened(made.folder, made.leaves)
    with pytest.raises(CorruptSwap):
        step(state, batch())
