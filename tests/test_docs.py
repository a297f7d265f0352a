"""The documents' code runs as printed, and prints what is printed under it; so do the examples in docstrings."""

import ast
import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "jzero").rglob("*.py"))
    if ">>> " in path.read_text() and path.name != "__init__.py"
]
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(document):
    """(line, language, text) of every fenced block."""
    text = document.read_text()
    return [(text.count("\n", 0, match.start(2)), match[1], match[2]) for match in BLOCK.finditer(text)]


LONG = {"parallelism"}  # each of its axes compiles a step


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem)
        for path in DOCUMENTS
        if "```python" in path.read_text()
    ],
)
def test_code_prints_what_the_document_says(document):
    """All python blocks of a file share one namespace; a `text` block after one is its output, with `...` for anything."""
    names, printed = {"__name__": document.stem}, ""
    for line, language, text in blocks(document):
        if language == "python":
            tree = ast.increment_lineno(ast.parse(text), line)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(tree, str(document), "exec"), names)
            printed = out.getvalue()
        elif language == "text":
            matches = doctest.OutputChecker().check_output(text, printed, LENIENT)
            assert matches, f"{document}:{line}: the code above printed\n{printed}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    lost = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not lost, f"{document} links to {lost}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(module), optionflags=LENIENT)
    assert results.attempted, f"{module} has a >>> that is no example"
    assert not results.failed, f"{results.failed} examples of {module} failed, see above"
