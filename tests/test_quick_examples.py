"""The examples that do not keep results by cell: each runs in the form that `make reproduce-quick` gives it."""

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
def test_quick_forms_run_and_leave_the_docs_alone(name, tmp_path, monkeypatch, capfd):
    pytest.importorskip(NEEDED.get(name, "torch"))
    folders = [ROOT / "docs" / folder for folder in ("data", "images")]
    docs = lambda: {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    before = docs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    failed = reproduce.main(["--quick", "--out", str(tmp_path), "--only", name])
    printed = capfd.readouterr()
    assert failed == 0, printed.err[-2000:]
    assert f"== {name}: done in " in printed.out and docs() == before
