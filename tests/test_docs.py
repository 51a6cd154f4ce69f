"""What newcomers read is true: every python block of README and docs runs, pages are complete, the demo works."""

import re
import sys
from pathlib import Path

import pytest
import torch

import nngeom as nng

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The source of every python block, padded so that line numbers are the page's."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"docs_{page.stem}"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def test_public_names_are_documented():
    public = {n for n, x in vars(nng).items() if not n.startswith("_") and not isinstance(x, type(sys))}
    listed = set(re.findall(r"^\.\. auto\w+:: nngeom\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    assert listed - public == set(), "these are gone: take them out of docs/api.md"
    assert [
        n for n in sorted(public) if not (getattr(nng, n).__doc__ or "").strip()
    ] == []  # the page adds what it does not place


def test_links_between_pages_resolve():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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


def test_readme_shows_the_demo():
    """Every representation of the demo has a row in the README's output, with its memory."""
    sys.path.insert(0, str(ROOT / "examples"))
    import fisher_of_digits as demo

    text = (ROOT / "README.md").read_text()
    for name in demo.REPRESENTATIONS:
        assert re.search(rf"^{re.escape(name)} {{2,}}\S", text, re.M), name
    assert torch.is_tensor(demo.digits()[0])
