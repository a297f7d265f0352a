"""Steps under test compile as quickly as their references."""

import pytest
from compiling import QUICK

from jzero.engine import compiler


@pytest.fixture(autouse=True)
def quick_compiles(monkeypatch):
    needed = compiler.options

    def options(mesh):
        is_cpu = mesh.devices.flat[0].platform == "cpu"
        return {**needed(mesh), **(QUICK if is_cpu else {})}

    monkeypatch.setattr(compiler, "options", options)
