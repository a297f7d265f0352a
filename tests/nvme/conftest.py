"""A step whose swap lies in the test's own folder."""

import pytest
import swapped


@pytest.fixture
def step(tmp_path):
    return swapped.make_step(tmp_path / "swap")
