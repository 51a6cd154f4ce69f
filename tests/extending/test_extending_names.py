"""What is written from outside is short, imports public names alone, and is what the docs show."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ["geometric", "unit_eye", "mix", "signal_to_noise", "matrices_only", "root_of_squares"]
TREES = {name: ast.parse((HERE / f"{name}.py").read_text()) for name in FILES}
PUBLIC = ("nngeom", "nngeom.layers", "nngeom.pmat", "nngeom.cotangents", "nngeom.optim")


@pytest.mark.parametrize("name", FILES)
def test_at_most_forty_lines(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", FILES)
def test_imports_are_public(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nngeom"):
            assert node.module in PUBLIC
            assert {a.name for a in node.names} <= set(importlib.import_module(node.module).__all__)
        if isinstance(node, ast.Import):
            assert all(a.name == "nngeom" or not a.name.startswith("nngeom") for a in node.names)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "nng":
            module = importlib.import_module("nngeom")
            assert node.attr in module.__all__ or inspect.ismodule(getattr(module, node.attr))
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.endswith("__")


def test_the_docs_show_them():
    text = (HERE.parent.parent / "docs" / "extending.md").read_text()
    shown = re.findall(r"^```\{literalinclude\} \.\./tests/extending/(\w+)\.py$", text, re.M)
    assert sorted(shown) == sorted(FILES)
