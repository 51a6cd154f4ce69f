"""Other versions of Python and torch: what they would trip over is looked for in the text, and run where it can be."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nngeom.core import forward_mode

ROOT = Path(__file__).parent.parent
MAKE = ["make", "-n", "setup"]


def test_every_text_is_python_of_the_oldest_version():
    for folder in ("nngeom", "tests", "examples", "benchmarks", "docs"):
        for file in (ROOT / folder).rglob("*.py"):
            ast.parse(file.read_text(), feature_version=(3, 10))


def test_forward_mode_begins_in_one_place():
    """Where the warnings that torch gives of itself are kept from users."""
    users = [f for f in (ROOT / "nngeom").rglob("*.py") if "dual_level(" in f.read_text()]
    assert [str(f.relative_to(ROOT)) for f in users] == ["nngeom/core/forward_mode.py"]


def test_forward_mode_says_nothing_of_torch():
    """In a process of its own: torch warns once, when its rules are loaded."""
    code = "import torch; from nngeom.core.forward_mode import forward_mode as f\nwith f(): pass"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


EVERYTHING = """
import importlib, pkgutil, nngeom
for module in pkgutil.walk_packages(nngeom.__path__, "nngeom."):
    try:
        module.name.endswith("__main__") or importlib.import_module(module.name)
    except ImportError:  # an extra that is missing
        pass
"""


def test_imports_say_nothing_of_others():
    """Of torch, or of what other libraries do with it."""
    kinds = [f"-Werror::{kind}" for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")]
    done = subprocess.run(
        [sys.executable, *kinds, "-c", EVERYTHING], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_users_keep_their_own_warnings():
    forward_mode._load_rules.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with forward_mode.forward_mode():
            warnings.warn("mine", DeprecationWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["mine"]


@pytest.mark.parametrize(
    "given, venv, pinned",
    [
        ([], ".venv", True),
        (["TORCH=2.6.0"], ".venv-python3-2.6.0", False),
        (["TORCH=2.6.0", "PYTHON=/x/python3.12"], ".venv-python3.12-2.6.0", False),
        (["WITH=transformers==4.57.6"], ".venv-python3-2.13.0-transformers-4.57.6", False),
    ],
    ids=str,
)
def test_other_versions_have_environments_of_their_own(given, venv, pinned):
    pytest.importorskip("shutil").which("make") or pytest.skip("make is not installed")
    told = subprocess.run([*MAKE, "-B", *given], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{venv}/bin/python -m pip" in told and ("-c constraints.txt" in told) == pinned
    assert all(x.partition("=")[2] in told for x in given)


def test_all_versions_by_one_command():
    """Oldest to newest, a pair of Python and torch each; all are tried, whatever becomes of the first."""
    pytest.importorskip("shutil").which("make") or pytest.skip("make is not installed")
    makefile, project = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    pairs = dict(re.findall(r"python(3\.\d+):([\d.]+)", makefile.partition("PAIRS ?=")[2].splitlines()[0]))
    assert list(pairs) == re.findall(r"Python :: (3\.\d+)", project)
    oldest = re.search(r'"torch>=([\d.]+)"', project)[1]
    assert pairs["3.10"].startswith(oldest) and f"TORCH ?= {pairs['3.11']}" in makefile
    command = ["make", "test-versions", "MAKE=./made", "PAIRS=python0.1:2.0 sh:2.6.0 bash:2.14.1"]
    done = subprocess.run([*command, "-f", str(ROOT / "Makefile")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "python0.1:2.0 left out: python0.1 is not installed" in done.stdout
    assert "failed: sh:2.6.0 bash:2.14.1" in done.stdout


def test_torch_is_one_that_is_asked_for():
    oldest = (2, 6)
    assert tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= oldest
    assert '"torch>=2.6"' in (ROOT / "pyproject.toml").read_text()
