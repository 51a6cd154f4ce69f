"""What objects offer at a prompt: arrays, notebooks, short texts, frames, other dtypes, files of torch."""

import io
import json
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm.auto
from cases import STORED, STORED_KERNELS, build, representation
from small import model_of, normal
from torch import nn

import nngeom as nng
from nngeom import track
from nngeom.core.optional import optional

ROOT = Path(__file__).parent.parent


def held(name: str) -> dict[str, object]:
    """One object of every kind that has its entries, of a case."""
    case = build(name)
    out: dict[str, object] = {r: nng.FIM(case.model, case.loader, representation(r, case.model)) for r in STORED}
    out |= {f"kernel {k}": nng.GramMatrix(case.model, case.loader, kind) for k, kind in STORED_KERNELS.items()}
    out["jacobian"] = nng.Jacobian(case.model, case.loader)
    out["transposed jacobian"] = out["jacobian"].T
    out["vector"], out["function"] = nng.PVector.from_model(case.model), nng.FVector(normal(2, 3))
    out["sum"], out["inverse"] = out["kfac"] + out["low-rank"], out["kfac"].inverse(0.1)
    return out


NAMES = [*STORED, *(f"kernel {k}" for k in STORED_KERNELS), "jacobian", "transposed jacobian", "vector", "function"]
NAMES += ["sum", "inverse"]


@pytest.fixture(scope="module", params=["mlp", "conv2d", "embedding", "tied"])
def objects(request):
    return held(request.param)


def entries(x):
    return x.to_dense() if hasattr(x, "to_dense") else x.tensor


@pytest.mark.parametrize("name", NAMES)
def test_numpy_reads_entries(objects, name):
    x = objects[name]
    assert np.array_equal(np.asarray(x), entries(x).numpy()) and np.asarray(x).dtype == np.float64
    assert np.array_equal(np.array(x, dtype=np.float32), entries(x).numpy().astype(np.float32))
    assert np.allclose(np.asarray(np.float32(2) * x), 2 * np.asarray(x), rtol=1e-12, atol=1e-14)
    assert np.allclose(np.asarray(np.float64(2) * x), 2 * np.asarray(x), rtol=1e-12, atol=1e-14)


def test_numpy_reads_graphs_and_half_precision():
    w = nng.FVector(normal(2, 3).requires_grad_())
    assert np.array_equal(np.asarray(w), w.tensor.detach().numpy())
    half = w.detach().to(torch.bfloat16)
    assert np.array_equal(np.asarray(half), half.tensor.float().numpy())


@pytest.mark.parametrize("name", NAMES)
def test_objects_move(objects, name):
    x = objects[name]
    assert x.float().dtype == torch.float32 and x.float().double().dtype == torch.float64
    assert x.cpu().device.type == "cpu" and type(x.cpu()) is type(x)
    assert torch.equal(entries(x.cpu()), entries(x))


def test_cuda_is_asked_of_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(nng.FVector, "to", lambda self, *args: asked.append(args) or self)
    v = nng.FVector(normal(1, 2))
    v.cuda(), v.cuda(1), v.cuda("cuda:2")
    assert asked == [("cuda",), (torch.device("cuda", 1),), ("cuda:2",)]


def test_implicit_objects_do_not_move():
    case = build("mlp")
    for x in (
        nng.FIM(case.model, case.loader, nng.PMatImplicit),
        nng.GramMatrix(case.model, case.loader, nng.FMatImplicit),
        nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit),
        nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit).T,
    ):
        with pytest.raises(nng.UnsupportedError, match=r"move the model"):
            x.double()
        assert type(x).__name__ in x._repr_html_()


class Tags(HTMLParser):
    """The tags that are open, and all that were."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen |= {tag}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def require_html(text: str) -> None:
    """Well nested, and nothing that runs or is fetched."""
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.seen <= {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "://" not in text and len(text) < 30_000


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_show_objects(objects, name):
    x = objects[name]
    text = x._repr_html_()
    require_html(text)
    assert type(x).__name__ in text and "float64" in text
    if isinstance(x, nng.PVector):
        assert all(f"{x[n].norm():.3g}" in text for n in x.layer_collection.names)
    if name in STORED:
        assert all(type(block).__name__ in text for block in x.blocks.values())


def test_what_is_shown_is_escaped_and_short():
    model = model_of(*(nn.Linear(1, 1) for _ in range(60)))
    f = nng.FIM(model, [(normal(3, 1),)], nng.PMatDiag, likelihood="gaussian")
    v = f.diag()
    assert v._repr_html_().count("<tr>") == 42 and "80 more" in v._repr_html_()
    lc = nng.LayerCollection(("<script>",), ((2,),), ("a",))
    assert "<script>" not in nng.PVector(lc, normal(2))._repr_html_()


@pytest.mark.parametrize("name", NAMES)
def test_torch_loads_what_it_saved_without_code(objects, name):
    x, file = objects[name], io.BytesIO()
    torch.save({"it": x}, file)
    file.seek(0)
    y = torch.load(file, weights_only=True)["it"]
    assert type(y) is type(x) and torch.equal(entries(y), entries(x))
    assert repr(y) == repr(x)


def test_torch_loads_bases(objects):
    for name in ("ekfac", "quasi-diag", "low-rank", "mixed", "eye"):
        basis, file = objects[name].eigh()[1], io.BytesIO()
        torch.save(basis, file)
        file.seek(0)
        x = normal(basis.layer_collection.numel)
        assert torch.equal(torch.load(file, weights_only=True).mv(x), basis.mv(x))


def test_torch_refuses_what_is_not_of_the_library(monkeypatch):
    monkeypatch.setattr(nng.PMatDiag.kinds, "_classes", list(nng.PMatDiag.kinds.classes()))  # so that it is forgotten

    class Mine(nng.PMatDiag):
        """A user's own."""

    globals()["Mine"], Mine.__qualname__ = Mine, "Mine"
    case, file = build("mlp"), io.BytesIO()
    torch.save(nng.FIM(case.model, case.loader, Mine), file)
    file.seek(0)
    with pytest.raises(Exception, match="Mine"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["ekfac", "dense", "low-rank", "mixed"])
def test_bases_are_short(objects, name):
    basis = objects[name].eigh()[1]
    assert len(repr(basis)) < 90 and f"({basis.layer_collection.numel}, " in repr(basis)
    assert repr(basis.T).endswith("transposed)")


@pytest.mark.parametrize("name", [*STORED, "sum", "inverse"])
def test_symmetric_matrices_are_their_transposes(objects, name):
    assert torch.equal(objects[name].T.to_dense(), objects[name].to_dense())


def test_transposes_of_products():
    case = build("mlp")
    f, g = (nng.FIM(case.model, case.loader, kind) for kind in (nng.PMatDense, nng.PMatDiag))
    j = nng.Jacobian(case.model, case.loader)
    double = nng.PushForwardDense(j.layer_collection, normal(*j.shape))
    for x in (f @ g, f @ g + f, 2.0 * (g @ f) + f @ g, j.T @ double, j.T @ j):
        assert torch.allclose(x.T.to_dense(), x.to_dense().T, rtol=1e-12, atol=1e-12)
    assert (j.T @ j).T.symmetric


@pytest.mark.parametrize("add", [lambda x, c: x + c, lambda x, c: c + x, lambda x, c: x - c], ids=["+", "r+", "-"])
@pytest.mark.parametrize(
    "c", [0.1, -0.1, np.float64(0.1), torch.tensor(0.1)], ids=["float", "negative", "numpy", "torch"]
)
def test_numbers_are_added_as_damping(add, c):
    case = build("mlp")
    for x in (nng.FIM(case.model, case.loader), nng.GramMatrix(case.model, case.loader)):
        with pytest.raises(TypeError, match=r"damping=0\.1") as error:
            add(x, c)
        assert isinstance(error.value, nng.ArgumentTypeError) or isinstance(c, torch.Tensor)


def test_likelihoods_and_losses_say_their_settings():
    assert repr(nng.Categorical(dim=1)) == "Categorical(dim=1, ignore_index=-100)"
    assert repr(nng.Gaussian(0.5)) == "Gaussian(variance=0.5)" and repr(nng.Bernoulli()) == "Bernoulli()"
    told = repr(nng.CrossEntropy(weight=torch.ones(3), dim=-1))
    assert told == "CrossEntropy(weight=tensor of shape (3,), label_smoothing=0.0, ignore_index=-100, dim=-1)"


def test_numel_is_a_number_and_answers():
    lc = nng.LayerCollection.from_model(nn.Linear(3, 2))
    assert lc.numel == lc.numel() == 8 and type(lc.numel()) is int and json.dumps(lc.numel) == "8"


def test_mixtures_take_modules_and_predicates():
    model = model_of(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    data = [(normal(6, 4), torch.arange(6) % 2)]
    named = nng.FIM(model, data, nng.PMatMixed({"0": nng.PMatKFAC}, default=nng.PMatDiag))
    for pattern in (
        model[0],
        lambda name: name.startswith("0."),
        lambda name, p: p.shape[0] == 3,
        ("0.weight", "0.bias"),
    ):
        mixed = nng.FIM(model, data, nng.PMatMixed({pattern: nng.PMatKFAC}, default=nng.PMatDiag))
        assert torch.equal(mixed.to_dense(), named.to_dense())


def test_progress_fits_the_terminal():
    """The bar is the one that knows notebooks."""
    from nngeom.sweep import run

    assert run.tqdm is tqdm.auto.tqdm


def test_a_notebook_without_widgets_is_told_of_nothing():
    """In a process of its own, which looks to tqdm like such a notebook."""
    code = (
        "import sys, types\n"
        "shell = types.SimpleNamespace(config={'IPKernelApp': 1})\n"
        "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: shell, display=None)\n"
        "sys.modules |= {'ipywidgets': None, 'ipykernel.zmqshell': sys}\n"
        "import nngeom.core.bars"
    )
    said = []
    for imported in (code, code.replace("nngeom.core.bars", "tqdm.auto")):
        command = [sys.executable, "-W", "default", "-c", imported]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        said.append("IProgress" in done.stderr)
    assert said == [False, True]


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(own_kinds):
    case = build("mlp")
    dense = nng.FIM(case.model, case.loader, nng.PMatDense)
    kinds = {"KFAC": nng.PMatKFAC, "diag": nng.PMatDiag}
    matrices = {name: nng.FIM(case.model, case.loader, kind) for name, kind in kinds.items()}
    return (
        nng.approximation_report(matrices, dense),
        nng.explain(case.model, case.loader[0]),
        nng.diagnose(case.model, case.loader[0]),
    )


def test_tables_are_read_as_they_print(tables):
    for table in tables:
        assert repr(table) == str(table)
        html = table._repr_html_()
        require_html(html)
        cells = re.findall(r"<t[dh][^>]*>([^<]+)<", html)
        assert len(cells) > 10 and all(cell in str(table) for cell in cells)


def test_tables_become_frames(tables):
    pytest.importorskip("pandas")
    report, explanation, diagnosis = tables
    frame = report.to_pandas()
    assert all(frame.loc[row, column] == report[row, column] for row in report.rows for column in report.columns[:-1])
    frame = explanation.to_pandas()
    assert list(frame.index) == [r.name for r in explanation.rows]
    assert [*frame["KFAC"]] == [r.numbers["KFAC"] for r in explanation.rows]
    assert frame.loc["0.weight", "shape"] == (5, 4) and frame.loc["0.weight", "operations"] == ("linear",)
    findings, effects = diagnosis.to_pandas(), diagnosis.to_pandas("effects")
    assert [*findings["placed"]] == [f.placed for f in diagnosis.findings]
    assert effects.loc["order", "change"] == diagnosis["order"].change


def test_histories_become_frames(tmp_path):
    pytest.importorskip("pandas")
    case = build("mlp")
    tracker = track.Tracker(case.model, case.loader, metrics=["loss"], every=1)
    for step in range(3):
        tracker.step(step, lr=0.1 * step)
    frame = tracker.to_pandas()
    assert [*frame.index] == [0, 1, 2] and [*frame["lr"]] == tracker.history["lr"]
    assert [*frame["probe_loss"]] == tracker.history["probe_loss"]
    require_html(tracker._repr_html_())
    tracker.save(tmp_path / "history.json")
    again = track.Tracker(case.model, case.loader, metrics=["loss"]).load(tmp_path / "history.json")
    assert again.history.to_pandas().equals(tracker.history.to_pandas())


def test_missing_libraries_are_named():
    with pytest.raises(nng.MissingExtraError, match=r"^no_such is not installed; install it: pip install no_such$"):
        optional("no_such.inner")
    with pytest.raises(ImportError, match="pip install other-name"):
        optional("no_such", "other-name")


def test_completion_offers_all_public_names():
    extra = set(dir(nng)) - set(nng.__all__)
    assert set(nng.__all__) <= set(dir(nng)) and {"analysis", "linearized", "mgs", "optim", "plot", "track"} <= extra
    assert all(isinstance(getattr(nng, name), types.ModuleType) for name in extra)
    assert nng.plot.spectrum.__module__.startswith("nngeom.plot")
