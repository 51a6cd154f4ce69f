"""The notebooks of the docs run from top to bottom without a warning, and are kept with what they show."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def outputs(notebook: dict) -> list[tuple[str, ...]]:
    """What every cell of code shows: the kinds, without the values."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [[o for o in cell["outputs"] if "findfont" not in "".join(o.get("text", ""))] for cell in cells]
    return [tuple(o.get("name", "+".join(sorted(o.get("data", {})))) for o in cell) for cell in shown]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_what_they_show(path):
    notebook = json.loads(path.read_text())
    kinds = [kind for cell in outputs(notebook) for kind in cell]
    assert "stderr" not in kinds and sum("image/png" in kind for kind in kinds) >= 2
    assert any("text/html" in kind for kind in kinds) and path.stat().st_size < 300_000
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert str(Path.home()) not in path.read_text() and "/tmp" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """In kernels of their own, as their readers do; what cells show is of the kinds that lie there."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for library in ("ipykernel", "matplotlib", "sklearn"):
        pytest.importorskip(library)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent.parent))
    notebook = nbformat.read(path, as_version=4)
    kept = outputs(notebook)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert outputs(notebook) == kept


def test_there_are_two():
    assert len(NOTEBOOKS) == 2
