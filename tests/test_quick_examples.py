"""The examples that do not keep results by cell: each runs in the form that `make reproduce-quick` gives it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import reproduce

ROOT = Path(__file__).parents[1]
for library in ("mlxtend", "sklearn", "matplotlib"):
    pytest.importorskip(library)

PAPERS = {p.stem for p in (ROOT / "examples").glob("*.py") if "PAGE = " in p.read_text()}
OTHERS = [name for name in reproduce.SCRIPTS if name not in PAPERS]
NEEDED = {"architectures": "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_quick_forms_run_and_leave_the_docs_alone(name, tmp_path):
    pytest.importorskip(NEEDED.get(name, "torch"))
    folders = [ROOT / "docs" / folder for folder in ("data", "images")]
    docs = lambda: {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    before = docs()
    command = [sys.executable, str(ROOT / "examples" / f"{name.partition(':')[0]}.py"), *reproduce.SCRIPTS[name][1]]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and docs() == before
