"""SIGKILL at any moment costs the steps since the last complete checkpoint, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "kills.py"
KILLS_NVME = Path(__file__).parent / "kills_nvme.py"


def killed(tmp_path, *words, script=KILLS):
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", str(script), "--json", str(tmp_path / "found.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "found.json").read_text())


def test_a_killed_run_resumes_bitwise(tmp_path):
    found = killed(tmp_path, "--kills", "3", "--steps", "60")
    assert found["kills"] == 3
    assert found["resumed"] >= 1
    assert found["losses_compared"] >= 60


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    """Every loss of every life and every restored state are compared with the uninterrupted run's, bit by bit."""
    found = killed(tmp_path, "--kills", "100")
    assert found["kills"] == 100
    assert found["resumed"] >= 50
    assert found["with_a_half_written_checkpoint"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("params", ["device", "nvme"])
def test_a_run_killed_in_an_update_of_its_swap(tmp_path, params):
    found = killed(tmp_path, "--kills", "1", "--steps", "10", "--params", params, script=KILLS_NVME)
    assert found["kills"] == found["swaps_read"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("params", ["device", "nvme"])
def test_fifty_kills_in_updates_of_a_swap(tmp_path, params):
    """Every swap that a life left holds the numbers of one step of the uninterrupted run, bit by bit; so do all losses."""
    found = killed(tmp_path, "--kills", "50", "--params", params, script=KILLS_NVME)
    assert found["kills"] == found["swaps_read"] == 50
    assert found["in_an_update"] >= 25
    assert found["with_a_half_written_generation"] >= 10
    assert found["resumed"] >= 25
