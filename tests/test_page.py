"""The report: one file that holds the numbers it says, opens without a network, and answers to clicks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser import visit
from cases import build
from small import model_of, normal
from torch import nn

import nngeom as nng
from nngeom import track

LIMIT = 3_000_000


def training(model: nn.Module, data, steps: int = 20) -> track.Tracker:
    """A tracker after some steps."""
    tracker = track.Tracker(model, data, metrics=["loss", "accuracy", "spectrum", "parameter_norm"], every=1)
    for step in range(steps):
        tracker.step(step, lr=0.1 / (step + 1), late=float("nan") if step < 5 else step)
    return tracker


@pytest.fixture(scope="module")
def given():
    """A model with everything that a report may show."""
    model = model_of(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = normal(14, 5), torch.arange(14) % 3
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    kinds = {"Fisher <&> exact": nng.PMatDense, "EKFAC": nng.PMatEKFAC, "products": nng.PMatImplicit}
    matrices = {name: nng.FIM(model, data, kind) for name, kind in kinds.items()}
    matrices["Hessian"] = nng.Hessian(model, data, nng.PMatDense, loss="cross_entropy")
    influence = nng.influence(model, data, data[1:], matrices["EKFAC"], loss="cross_entropy", damping=0.1)
    return {
        "model": model,
        "loader": data,
        "matrix": matrices,
        "kernel": nng.GramMatrix(model, data),
        "tracker": training(model, data),
        "influence": influence,
    }


@pytest.fixture(scope="module")
def page(given, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    nng.report(
        path, given["model"], given["loader"], **{k: v for k, v in given.items() if k not in ("model", "loader")}
    )
    return path


def charts(page: Path) -> dict[str, dict]:
    """The charts by caption."""
    found = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', page.read_text())
    return {block["caption"]: block for block in map(json.loads, found)}


def test_it_is_one_small_file_that_refers_to_nothing(page):
    text = page.read_text()
    assert len(text.encode()) < LIMIT
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", text) == [] and "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_it_has_all_sections(page):
    titles = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert titles == ["What was seen", "Spectra", "Layers", "Approximation", "Training", "Influence"]


def test_spectra_are_those_of_the_dense_matrices(given, page):
    block = charts(page)["Positive eigenvalues"]
    by_name = {s["name"]: s for s in block["series"]}
    for name, m in {**given["matrix"], "FMatDense": given["kernel"]}.items():
        values = torch.linalg.eigvalsh(m.to_dense()).flip(0)
        shown = torch.tensor(by_name[name]["y"], dtype=torch.float64)
        assert torch.allclose(shown, values[: len(shown)], rtol=1e-5)
        assert by_name[name]["x"] == list(range(1, len(shown) + 1))
        known = 20 if name == "products" else len(values)
        assert values[:known][len(shown) :].max() < 1e-12 * values[0] if len(shown) < known else True
    (hessian,) = charts(page)["Negative eigenvalues, absolute"]["series"]
    negative = torch.linalg.eigvalsh(given["matrix"]["Hessian"].to_dense())
    negative = -negative[negative < -1e-12 * negative.abs().max()]
    assert hessian["name"] == "Hessian" and torch.allclose(torch.tensor(hessian["y"]).double(), negative, rtol=1e-5)


def test_layers_are_those_of_the_blocks(given, page):
    groups = {g["name"]: g for g in charts(page)["By layer"]["groups"]}
    for name, m in given["matrix"].items():
        blocks = [b.to_dense() for b in m.by_layer().values()]
        assert groups[f"{name}: trace"]["labels"] == ["0", "2"]
        assert groups[f"{name}: trace"]["values"] == pytest.approx([float(b.trace()) for b in blocks], rel=1e-5)
        top = [float(torch.linalg.eigvalsh(b)[-1]) for b in blocks]
        assert groups[f"{name}: largest eigenvalue"]["values"] == pytest.approx(top, rel=1e-4)
    assert groups["products: effective rank"]["values"] == [None, None]


def cells(page: Path, caption: str) -> list[list[str]]:
    """The cells of a table, line by line."""
    table = re.search(rf"<h3>{caption}</h3>.*?<table>(.*?)</table>", page.read_text(), re.S)[1]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


def test_tables_are_those_of_the_library(given, page):
    model, batch = given["model"], given["loader"][0]
    told = nng.explain(model, batch)
    head, *rows = cells(page, "Parameters")
    assert [row[0] for row in rows] == [r.name for r in told.rows]
    assert [row[head.index("Dense")] for row in rows] == [f"{r.numbers['Dense']:,}" for r in told.rows]
    assert [row[-1] for row in cells(page, "Proofs")[1:]] == [f.right for f in nng.diagnose(model, batch).findings]
    exact, *others = [name for name in given["matrix"] if name != "products"]
    report = nng.approximation_report({n: given["matrix"][n] for n in others}, given["matrix"][exact])
    head, *rows = cells(page, "Accuracy")
    assert [row[0] for row in rows] == others
    assert [row[head.index("forward cos")] for row in rows] == [f"{report[n, 'forward cos']:.3g}" for n in others]


def test_curves_are_the_history(given, page):
    history = given["tracker"].history
    shown = {s["name"]: s for block in charts(page).values() for s in block.get("series", []) if block["x"] == "step"}
    assert shown.keys() == history.keys() - {"step"}
    for name, s in shown.items():
        assert s["x"] == history["step"]
        assert s["y"] == [None if x != x else pytest.approx(x, rel=1e-5) for x in history[name]]
    assert [s["name"] for s in charts(page)["eigenvalue"]["series"]] == [
        n for n in history if n.startswith("eigenvalue")
    ]


def test_influence_is_the_extremes(given, page):
    scores = given["influence"].scores
    groups = charts(page)["Largest and smallest scores"]["groups"]
    assert len(groups) == len(scores)
    for row, group in zip(scores, groups):
        order = row.argsort(descending=True)
        assert group["labels"] == [f"train {i}" for i in order.tolist()], "fourteen examples, at most twenty shown"
        assert group["values"] == pytest.approx(row[order].tolist(), rel=1e-5)


CLICKS = """
const found = {charts: 0, painted: 0, changed: [], sorted: [], tips: 0};
const text = (node) => node.textContent;
found.title = document.title;
found.charts = document.querySelectorAll('[data-chart]').length;
found.painted = document.querySelectorAll('[data-chart] svg').length;
for (const holder of document.querySelectorAll('[data-chart]')) {
  const before = () => holder.querySelector('svg').innerHTML;
  for (const button of holder.querySelectorAll('button')) {
    const was = before(); button.click(); found.changed.push(before() !== was); button.click();
    if (before() !== was) found.changed.push('not undone: ' + button.textContent);
  }
  for (const select of holder.querySelectorAll('select')) {
    const was = before();
    select.value = String(select.options.length - 1); select.dispatchEvent(new Event('change'));
    found.changed.push(before() !== was);
  }
  const svg = holder.querySelector('svg'), box = svg.getBoundingClientRect(), tip = holder.querySelector('.tip');
  for (let x = box.left; x < box.right; x += 8) for (let y = box.top; y < box.bottom; y += 8) {
    if (!tip.hidden) break;
    svg.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y}));
  }
  const bar = svg.querySelector('rect'); if (bar) bar.dispatchEvent(new PointerEvent('pointerenter'));
  found.tips += !tip.hidden && /: -?[0-9]/.test(tip.textContent);
}
for (const table of document.querySelectorAll('table')) {
  const rows = () => [...table.tBodies[0].rows].map(text).join('|');
  for (const cell of table.tHead.rows[0].cells) {
    cell.querySelector('button').click(); const up = rows(), sorted = cell.getAttribute('aria-sort');
    cell.querySelector('button').click();
    found.sorted.push(sorted + ' ' + cell.getAttribute('aria-sort'));
  }
}
const heads = [...document.querySelectorAll('h3')];
const counts = heads.find((h) => text(h) === 'Counts').nextElementSibling.querySelector('table');
[...counts.tHead.rows[0].cells].find((c) => text(c) === 'largest').querySelector('button').click();
found.largest = [...counts.tBodies[0].rows].map((row) => Number(row.cells[5].textContent));
const search = document.querySelector('input[type=search]');
search.value = 'no such row'; search.dispatchEvent(new Event('input'));
const kept = [...search.parentNode.nextElementSibling.querySelectorAll('tbody tr')];
found.left = kept.filter((row) => !row.hidden).length;
found.anchored = 0;
for (const link of document.querySelectorAll('nav a')) {
  link.click();
  found.anchored += !!document.querySelector(location.hash);
}
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.injected = document.querySelectorAll('main script:not([type]), main net, main img').length;
return found;
"""


@pytest.mark.parametrize("width", [1440, 500])
def test_clicking_through(page, width):
    """Every button, choice, heading and link does something; nothing is complained of or asked for."""
    found = visit(page, CLICKS, width)
    assert "thrown" not in found, found
    assert found["console"] == [] and found["requests"] == []
    assert found["charts"] == found["painted"] == found["tips"] == len(charts(page))
    assert len(found["changed"]) > 30 and all(x is True for x in found["changed"])
    assert set(found["sorted"]) == {"ascending descending"} and len(found["sorted"]) > 30
    assert found["largest"] == sorted(found["largest"]) and found["left"] == 0
    assert found["anchored"] == 6 and found["wide"] and found["injected"] == 0


def test_a_report_of_the_model_alone(tmp_path):
    case = build("embedding")
    nng.report(tmp_path / "a.html", case.model, case.loader, title="</title><script>alert(1)</script>")
    text = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["What was seen"]


def test_names_cannot_end_the_script(tmp_path, given):
    evil = {"</script><script>alert(1)</script>": given["matrix"]["EKFAC"], "b & c": given["matrix"]["Hessian"]}
    nng.report(tmp_path / "a.html", given["model"], given["loader"], matrix=evil)
    assert "<script>alert" not in (tmp_path / "a.html").read_text()
    assert {s["name"] for s in charts(tmp_path / "a.html")["Positive eigenvalues"]["series"]} == evil.keys()


def test_large_reports_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr("nngeom.page.blocks.MOST_ROWS", 100)
    model = model_of(*(nn.Linear(2, 2) for _ in range(60)))
    data = [(normal(3, 2), torch.arange(3) % 2)]
    history = {"step": list(range(5000)), **{f"q{j}/layer": [0.1 * j + k for k in range(5000)] for j in range(150)}}
    scores = normal(200, 3000)
    diagonal = nng.PMatDiag.from_vector(
        nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=torch.float64).apply(torch.exp)
    )
    nng.report(tmp_path / "a.html", model, data, matrix=diagonal, tracker=history, influence=scores)
    text = (tmp_path / "a.html").read_text()
    assert len(text.encode()) < LIMIT and "and 20 more rows" in text and "first 50 of 200 queries" in text
    (s,) = charts(tmp_path / "a.html")["q7"]["series"]
    assert (s["x"][0], s["x"][-1]) == (0, 4999) and len(s["x"]) < 1000, "both ends stay"


def test_nothing_is_half_written(tmp_path, given):
    with pytest.raises(nng.FileError, match="cannot be written"):
        nng.report(tmp_path / "nowhere" / "a.html", given["model"], given["loader"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"matrix": 3}, nng.ArgumentTypeError, "matrix 'int' is int; expected a matrix"),
        ({"kernel": {"K": 3}}, nng.ArgumentTypeError, "kernel 'K' is int"),
        ({"tracker": [1]}, nng.ArgumentTypeError, "expected a nng.track.Tracker"),
        ({"influence": 3}, nng.ArgumentTypeError, "expected what nng.influence returned"),
    ],
)
def test_what_cannot_be_shown(tmp_path, given, options, error, told):
    with pytest.raises(error, match=told):
        nng.report(tmp_path / "a.html", given["model"], given["loader"], **options)
    assert not (tmp_path / "a.html").exists()


def test_a_matrix_and_a_kernel_of_one_name(tmp_path, given):
    both = {"matrix": {"x": given["matrix"]["EKFAC"]}, "kernel": {"x": given["kernel"]}}
    with pytest.raises(nng.ArgumentError, match="share a name"):
        nng.report(tmp_path / "a.html", given["model"], given["loader"], **both)


# -- the command -------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
inputs, targets = torch.randn(12, 4), torch.arange(12) % 3
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
batches = [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]


def make_model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def make_data():
    yield from batches
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    space: dict = {}
    exec(SCRIPT, space)
    torch.save(space["model"].state_dict(), tmp_path / "weights.pt")
    torch.save((space["inputs"], space["targets"]), tmp_path / "data.pt")
    tracker = training(space["model"], space["batches"], 3)
    tracker.save(tmp_path / "history.json")
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python -m nngeom report ...`` in a folder."""
    root = str(Path(__file__).parent.parent)
    run = [sys.executable, "-m", "nngeom", "report", *arguments]
    env = {"PYTHONPATH": root, "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_the_same_page(folder, own_kinds):
    given = [
        "mine.py:make_model",
        "--data",
        "data.pt",
        "--batch-size",
        "7",
        "--weights",
        "weights.pt",
        "--matrix",
        "ekfac",
    ]
    given += ["--matrix", "PMatDiag", "--kernel", "--history", "history.json", "--out", "a.html", "--title", "mine"]
    done = command(folder, *given)
    assert done.returncode == 0 and done.stdout == "wrote a.html\n", done.stderr
    space: dict = {}
    exec(SCRIPT, space)
    model, batches = space["model"].eval(), space["batches"]
    history = track.Tracker(model, batches).load(folder / "history.json").history
    matrices = {"ekfac": nng.FIM(model, batches, nng.PMatEKFAC), "PMatDiag": nng.FIM(model, batches, nng.PMatDiag)}
    kernel = nng.GramMatrix(model, batches[:1])
    nng.report(folder / "b.html", model, batches, matrix=matrices, kernel=kernel, tracker=history, title="mine")
    same = lambda name: re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", (folder / name).read_text())
    assert same("a.html") == same("b.html") and charts(folder / "a.html").keys() == charts(folder / "b.html").keys()


def test_the_command_takes_objects_and_generators(folder):
    from nngeom.page.command import main

    assert (
        main(
            ["report", f"{folder}/mine.py:model", "--data", f"{folder}/mine.py:make_data", "--out", f"{folder}/a.html"]
        )
        == 0
    )
    assert "What was seen" in (folder / "a.html").read_text()


@pytest.mark.parametrize(
    "change, told",
    [
        ({0: "mine.py"}, "expected FILE.py:NAME"),
        ({0: "none.py:model"}, "there is no file"),
        ({0: "mine.py:nothing"}, "defines no 'nothing'; it has"),
        ({0: "mine.py:inputs"}, "expected a torch.nn.Module"),
        ({2: "none.pt"}, "cannot be read"),
        ({2: "weights.pt"}, "does not hold tensors"),
        ({3: "--matrix", 4: "Wrong"}, "expected one of"),
        ({3: "--weights", 4: "data.pt"}, "does not fit the model"),
        ({3: "--history", 4: "weights.pt"}, "no file of a tracker"),
        ({3: "--out", 4: "no/where.html"}, "cannot be written"),
    ],
)
def test_what_the_command_refuses(folder, change, told, capsys, monkeypatch):
    from nngeom.page.command import main

    monkeypatch.chdir(folder)
    arguments = ["mine.py:model", "--data", "data.pt", "--out", "a.html"]
    with pytest.raises(SystemExit) as stop:
        main(["report", *({j: x for j, x in enumerate(arguments)} | change).values()])
    assert stop.value.code == 2 and told in capsys.readouterr().err and not Path("a.html").exists()
