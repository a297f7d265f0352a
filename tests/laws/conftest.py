"""Steps under test compile as quickly as their references."""

import pytest
from compiling import QUICK

from jzero.engine import compiler


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    needed = compiler.options
    monkeypatch.setattr(compiler, "options", lambda mesh: {**needed(mesh), **QUICK})
