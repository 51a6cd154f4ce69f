"""The site: formulas are read as TeX, every object has a page, examples are short and run, newcomers' tasks too."""

import ast
import posixpath
import re
from pathlib import Path

import pytest
from test_docs import PAGES, ROOT, blocks, public
from torchrun import torchrun

formulas = pytest.importorskip("formulas", reason="latex2mathml is not installed")
gallery_style, objects = (pytest.importorskip(name) for name in ("gallery_style", "objects"))

GALLERY = sorted((ROOT / "docs" / "gallery").glob("plot_*.py"))
QUICK = {"plot_14_hessian_spectrum", "plot_20_your_own"}
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w$])\$([^$\n]+?)\$", re.S)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)


def test_formulas_are_read_as_tex():
    found = [(page.name, a or b) for page in PAGES for a, b in FORMULA.findall(prose(page))]
    assert len(found) > 100
    for name, tex in found:
        assert formulas.mathml(tex).startswith("<math"), f"{name}: {tex}"


@pytest.mark.parametrize("tex", [r"\tfrac12", r"\frac12", r"\frac1n", r"\dfrac 1 2"])
def test_fractions_without_braces(tex):
    """The arguments of a command are two tokens, not a number of two digits over what comes next."""
    top, bottom = re.search(r"<mfrac>(<m\w>.</m\w>)(<m\w>.</m\w>)</mfrac>", formulas.mathml(tex + r" \eta")).groups()
    assert (top, bottom) in {("<mn>1</mn>", "<mn>2</mn>"), ("<mn>1</mn>", "<mi>n</mi>")}


def test_letters_of_other_alphabets_are_characters():
    assert "\U0001d53c" in formulas.mathml(r"\mathbb E x") and "\u2112" in formulas.mathml(r"\mathcal{L}")


def test_commands_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        formulas.mathml(r"\nonsense x")


def test_every_entry_has_a_page(tmp_path):
    class App:
        srcdir = str(tmp_path)

    objects.write_pages(App)
    pages = {p.stem for p in (tmp_path / objects.FOLDER).iterdir()}
    data = {"nngeom.track.QUANTITIES"}
    assert set(public.entries()) - data == pages
    objects.write_pages(App)  # again, with nothing to do
    assert {p.stem for p in (tmp_path / objects.FOLDER).iterdir()} == pages


def test_tables_list_what_their_pages_describe():
    source = [(ROOT / "docs" / "reference" / "optim.md").read_text()]
    objects.as_tables(None, "reference/optim", source)
    assert "~nngeom.optim.EKFAC" in source[0] and "../objects/nngeom.optim.EKFAC" in source[0]
    assert ".. autoclass" not in source[0]


def test_every_page_is_in_the_navigation():
    index = (ROOT / "docs" / "index.md").read_text()
    named = set(re.findall(r"^[\w/]+$", index, re.M))
    pages = {str(p.relative_to(ROOT / "docs").with_suffix("")) for p in PAGES if p.parent != ROOT} - {"index"}
    pages |= {f"notebooks/{p.stem}" for p in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    pages = {p for p in pages if not p.startswith("coming_from/") or p.endswith("index")}
    assert named - pages <= {"how_to/index"}, "these are named and not there"
    assert "@more@" in index or pages <= named


def test_inventory_of_torch(tmp_path):
    from sphinx.util.inventory import InventoryFile

    objects.write_inventory(tmp_path / "torch.inv")
    with (tmp_path / "torch.inv").open("rb") as stream:
        found = InventoryFile.load(stream, objects.TORCH, posixpath.join)["py:class"]["torch.Tensor"]
    uri = found[2] if isinstance(found, tuple) else found.uri  # Sphinx before 8.2, and since
    assert uri.endswith("tensors.html#torch.Tensor")


def code_lines(path: Path) -> int:
    """Lines of an example but for its text, imports and empty ones."""
    source = path.read_text()
    rest = source.splitlines()[ast.parse(source).body[0].end_lineno :]
    return sum(bool(line.strip()) and not line.startswith(("import ", "from ")) for line in rest)


def test_gallery_is_large_and_examples_are_short():
    assert len(GALLERY) >= 16
    assert [p.name for p in GALLERY if code_lines(p) > 40] == []
    for path in GALLERY:
        title, underline = ast.get_docstring(ast.parse(path.read_text())).splitlines()[:2]
        assert len(title) == len(underline), path.name


def run_example(path, monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.get_fignums()))
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.chdir(tmp_path)
    gallery_style.plain(None, str(path))
    try:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "example", "__file__": str(path)})
    finally:
        plt.close("all")
    return figures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [p for p in GALLERY if p.stem in QUICK], ids=lambda p: p.stem)
def test_examples_of_the_gallery_run(path, monkeypatch, tmp_path):
    assert run_example(path, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [p for p in GALLERY if p.stem not in QUICK], ids=lambda p: p.stem)
def test_all_examples_of_the_gallery_run(path, monkeypatch, tmp_path, capsys):
    if "laplace" in path.read_text():
        pytest.importorskip("laplace")
    figures = run_example(path, monkeypatch, tmp_path)
    assert figures or "process 1" in capsys.readouterr().out


def test_tasks_of_newcomers_are_short():
    tasks = ROOT / "docs" / "tasks.md"
    pieces = blocks(tasks)[1:] + [(ROOT / "docs" / "two_processes.py").read_text()]
    assert len(pieces) == 7
    for piece in pieces:
        assert sum(bool(line.strip()) for line in piece.splitlines()) <= 15


def test_two_processes(tmp_path):
    each = ["--log-dir", str(tmp_path), "--redirects", "3"]  # a file each: on one pipe words mix
    torchrun(ROOT / "docs" / "two_processes.py", tmp_path, *each)
    lines = [file.read_text().split() for file in tmp_path.rglob("stdout.log")]
    assert len(lines) == 2
    assert lines[0] == lines[1] and lines[0][0] == "100"
