"""What newcomers read is true: every python block of README and docs runs, pages are complete, the demo works."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lacking import SHARDS_ON_CPU, UNSHARDED

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import public

ROOT = Path(__file__).parent.parent
MADE = {"_build", "how_to"}  # by the build
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if not MADE & set(p.parts))]
PEERS = {p for p in PAGES if p.parent.name == "coming_from"}  # run by test_coming_from, where the peers are installed
LIBRARIES = {"frameworks": ["lightning.pytorch", "transformers", "accelerate", "tensorboard"], "laplace": ["laplace"]}
LIBRARIES["tasks"] = ["lightning", "transformers"]  # that pages run


def blocks(page: Path) -> list[str]:
    """The source of every python block, padded so that line numbers are the page's."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in found]


def shown(page: Path) -> list[Path]:
    """The files that a page shows whole."""
    names = re.findall(r"^```\{literalinclude\} (\S+)$", page.read_text(), re.M)
    return [(page.parent / name).resolve() for name in names]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p not in PEERS], ids=lambda p: p.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    """Files that are shown can be imported, as if they lay beside."""
    if "fully_shard(" in page.read_text() and not SHARDS_ON_CPU:
        pytest.skip(UNSHARDED)
    for folder in {file.parent for file in shown(page)}:
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"docs_{page.stem}"}
    with warnings.catch_warnings():
        for library in LIBRARIES.get(page.stem, ()):
            pytest.importorskip(library)
            warnings.simplefilter("ignore")  # those of their making
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), namespace)


def test_public_names_are_in_the_reference():
    public_names = {f"{package}.{name}" for package in public.PACKAGES for name in public.resolve(f"{package}.__all__")}
    listed = public.entries()
    assert sorted(public_names - {"nngeom.__version__"} - set(listed)) == [], "give these an entry in a reference page"
    assert [name for name in listed if listed.count(name) > 1] == []
    for name in listed:
        public.resolve(name)


@pytest.mark.parametrize("package", public.PACKAGES)
def test_all_names_what_is_imported(package):
    module = importlib.import_module(package)
    found = {n for n, x in vars(module).items() if not n.startswith("_") and not isinstance(x, type(sys))}
    assert set(module.__all__) - {"__version__"} == found


def test_links_between_pages_resolve():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            source = re.sub(r"how_to/(plot_\w+)\.rst", r"gallery/\1.py", target)  # of a page that the build makes
            source = source.replace("how_to/index.rst", "gallery/GALLERY_HEADER.rst")
            assert (page.parent / source).exists(), f"{page.name}: {target}"


def test_demo(tmp_path, monkeypatch, capsys):
    """The demo on a net of a few hundred parameters: all rows, all files, exact representations exact."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import fisher_of_digits as demo

    net = demo.ConvNet
    monkeypatch.setattr(demo, "ConvNet", lambda: net((2, 2, 2)))
    for name, value in {
        "CHECKPOINTS": {"initialisation": 0, "early": 1, "trained": 30},
        "FISHER_EXAMPLES": 24,
        "DRAWS": 3,
    }.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "seconds", lambda f: (f(), 1.0)[1])
    demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in demo.REPRESENTATIONS:
        row = next(line for line in printed.splitlines() if line.startswith(name + "  "))
        if name in demo.EXACT:
            assert row.count("1.000 ± 0.000") == 2
    assert {p.name for p in tmp_path.iterdir()} == {f"fisher_of_digits.{kind}" for kind in ("csv", "png", "pdf")}
    assert len((tmp_path / "fisher_of_digits.csv").read_text().splitlines()) == 1 + 3 * (3 + 9 * len(demo.DAMPINGS))


def test_docs_show_the_demo():
    """Every representation of the demo has a row in its output, with its memory."""
    sys.path.insert(0, str(ROOT / "examples"))
    import fisher_of_digits as demo

    text = (ROOT / "docs" / "representations.md").read_text()
    for name in demo.REPRESENTATIONS:
        assert re.search(rf"^{re.escape(name)} {{2,}}\S", text, re.M), name
    assert torch.is_tensor(demo.digits()[0])
