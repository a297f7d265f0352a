"""The house: BUILD is the table of rooms, read from top to bottom, and the imports of the code must say the same."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import jzero

ROOT = Path(__file__).parent.parent
PACKAGES = ("jzero", "pallas_kernels")


class Room(NamedTuple):
    name: str
    files: tuple[str, ...]
    deps: tuple[str, ...]


def read_rooms() -> list[Room]:
    """The py_library calls of BUILD, in order. Bazel's language is close enough to Python for Python's own parser."""
    calls = [node.value for node in ast.parse((ROOT / "BUILD").read_text()).body if isinstance(node, ast.Expr)]
    rooms = []
    for call in (call for call in calls if isinstance(call, ast.Call) and call.func.id == "py_library"):
        attributes = {keyword.arg: keyword.value for keyword in call.keywords}
        deps = ast.literal_eval(attributes["deps"]) if "deps" in attributes else []
        name = ast.literal_eval(attributes["name"])
        rooms.append(Room(name, tuple(read_srcs(attributes["srcs"])), tuple(dep.removeprefix(":") for dep in deps)))
    return rooms


def read_srcs(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Call):  # glob([...])
        patterns = ast.literal_eval(node.args[0])
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    return ast.literal_eval(node)


ROOMS = read_rooms()
ROOM_OF = {file: room.name for room in ROOMS for file in room.files}
SOURCES = sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_modules(file: str) -> set[str]:
    """Dotted names that a file imports, anywhere in it; for `from a import b` both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports from the top: `from jzero.room import name`"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_file(module: str) -> str | None:
    stem = module.replace(".", "/")
    return next((file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in SOURCES), None)


def imported_rooms(file: str) -> set[str]:
    """The rooms a file imports from, its own left out. `from jzero import mesh` is an import of mesh, not of the root."""
    modules = imported_modules(file)
    parents = {module.rpartition(".")[0] for module in modules if module_file(module)}
    files = {module_file(module) for module in modules - parents} - {None}
    return {ROOM_OF[found] for found in files if found in ROOM_OF} - {ROOM_OF[file]}


def external_packages(file: str) -> set[str]:
    tops = {module.partition(".")[0] for module in imported_modules(file)}
    return {top for top in tops if top not in sys.stdlib_module_names and top not in PACKAGES}


def test_every_source_file_is_in_one_room():
    missing = [file for file in SOURCES if file not in ROOM_OF]
    assert not missing, f"BUILD has no room for {missing}: add each to a py_library's srcs, below everything that it imports"
    listed = [file for room in ROOMS for file in room.files]
    assert sorted(listed) == SOURCES, f"twice in BUILD or not on disk: {sorted(set(listed) ^ set(SOURCES)) or listed}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_build_lists_the_imports(room):
    imported = {name: file for file in room.files for name in imported_rooms(file)}
    wanted = [f":{name}" for name in (other.name for other in ROOMS) if name in imported]
    assert sorted(imported) == sorted(room.deps), (
        f"BUILD, {room.name}: write deps = {wanted}; only BUILD has {sorted(set(room.deps) - set(imported))}, "
        f"only the code has { ({name: imported[name] for name in set(imported) - set(room.deps)}) }"
    )


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_imports_point_up(room):
    names = [other.name for other in ROOMS]
    below = [dep for dep in room.deps if dep not in names[: names.index(room.name)]]
    assert not below, (
        f"{room.name} imports from {below}, which BUILD has below it. Move what both need into a room above them; "
        "moving a room within BUILD is for a room that was wrongly placed (docs/decisions/0001-reading-order.md)"
    )


def test_external_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {re.split(r"[^a-zA-Z]", name)[0] for name in project["dependencies"] + extras["plot"] + extras["train"]}
    allowed = {"jzero": declared, "pallas_kernels": {"jax"}}
    extra = {file: external_packages(file) - allowed[file.partition("/")[0]] for file in SOURCES}
    extra = {file: names for file, names in extra.items() if names}
    assert not extra, f"{extra}: not in pyproject.toml's dependencies; pallas_kernels may import jax only"


def test_moving_jax_internals_stay_in_compat():
    moving = ("jax._", "jax.interpreters", "jaxlib")
    private = {file: {name for name in imported_modules(file) if name.startswith(moving)} for file in SOURCES}
    private = {file: names for file, names in private.items() if names and file != "jzero/_compat.py"}
    assert not private, f"{private}: go through jzero/_compat.py"


def test_importing_changes_nothing():
    """No device, environment variable, jax setting or XLA flag may be touched before the user calls something."""
    modules = [
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in SOURCES if "__main__" not in file
    ]
    script = f"""
import importlib, os, jax, flax.nnx, optax
before = dict(os.environ), dict(jax.config.values)
for module in {modules!r}:
    importlib.import_module(module)
    assert (dict(os.environ), dict(jax.config.values)) == before, f"importing {{module}} changes the environment or jax.config"
    assert not jax._src.xla_bridge.backends_are_initialized(), f"importing {{module}} touches a device"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_docstring():
    public = {name: value for name, value in vars(jzero).items() if not name.startswith("_") and not inspect.ismodule(value)}
    bare = [name for name, value in public.items() if not (inspect.getdoc(value) or "").strip()]
    assert not bare, f"these names of jzero have no docstring: {bare}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bazel") is None, reason="bazel is not installed; the tests above read BUILD themselves")
def test_bazel_builds_every_room(tmp_path):
    command = ["bazel", f"--output_base={tmp_path}", "--batch", "build", ":all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
