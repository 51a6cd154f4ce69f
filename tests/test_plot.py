"""Figures show the numbers that they say they show: what is drawn against dense matrices and torch's eigenvalues."""

import matplotlib
import numpy as np
import pytest
import torch
from cases import build
from small import model_of, normal
from torch import nn

import nngeom as nng
from nngeom import plot
from nngeom.analysis import effective_rank

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = [nng.PMatDense, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag, nng.PMatLowRank, nng.PMatBlockDiag]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def fisher(name: str = "mlp", kind=nng.PMatDense):
    """A Fisher matrix of a case."""
    case = build(name)
    return nng.FIM(case.model, case.loader, kind)


def drawn(ax, j: int = 0) -> np.ndarray:
    """The heights of a line."""
    return np.asarray(ax.get_lines()[j].get_ydata())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding"])
def test_spectra_are_those_of_the_dense_matrix(name, kind):
    m = fisher(name, kind)
    values = torch.linalg.eigvalsh(m.to_dense()).flip(0)
    ax = plot.spectrum(m)
    shown = drawn(ax)
    assert np.allclose(shown, values[: len(shown)].numpy(), rtol=1e-6, atol=1e-12 * float(values[0]))
    hidden = values[len(shown) :].abs()
    assert not len(hidden) or hidden.max() <= 1e-12 * values[0]
    (text,) = (t.get_text() for t in ax.get_legend().get_texts())
    assert text == kind.__name__ + (f" ({len(hidden)} at rounding)" if len(hidden) else "")


def test_negative_eigenvalues_are_hollow():
    case = build("mlp")
    h = nng.Hessian(case.model, case.loader, nng.PMatDense, loss="cross_entropy")
    values = torch.linalg.eigvalsh(h.to_dense())
    ax = plot.spectrum(h, label="H")
    negative = values[values < -1e-12 * values.abs().max()]
    assert len(negative) > 2 and np.allclose(drawn(ax, 1), -negative.numpy(), rtol=1e-6)
    assert ax.get_lines()[1].get_markerfacecolor() == "none"
    assert f"{len(negative)} negative" in ax.get_legend().get_texts()[0].get_text()


def test_spectra_of_kernels_products_and_numbers():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader)
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    dense = nng.FIM(case.model, case.loader, nng.PMatDense)
    ax = plot.spectrum({"K": k, "products": implicit, "numbers": torch.tensor([1.0, 3.0, 0.0])}, top=3)
    largest = lambda x: torch.linalg.eigvalsh(x.to_dense()).flip(0)[:3].numpy()
    assert np.allclose(drawn(ax, 0), largest(k)) and np.allclose(drawn(ax, 2), largest(dense), rtol=1e-5)
    assert drawn(ax, 4).tolist() == [3.0, 1.0]
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == [f"K (3 of {k.shape[0]})", f"products (3 of {dense.shape[0]})", "numbers (1 at rounding)"]


def test_densities_count_every_eigenvalue_once():
    m = fisher()
    ax = plot.spectrum(m, kind="density")
    values = torch.linalg.eigvalsh(m.to_dense())
    count = int((values > 1e-12 * values.max()).sum())
    assert sum(patch.get_height() for patch in ax.patches) == count
    assert plot.spectrum(torch.zeros(3), kind="density").get_legend() is not None


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_images_hold_the_entries_and_name_layers(scale):
    m = fisher()
    ax = plot.matrix(m, scale=scale)
    image = ax.get_images()[0]
    assert np.array_equal(np.asarray(image.get_array()), m.to_dense().numpy())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "2"] or {
        t.get_text() for t in ax.get_yticklabels()
    } == {
        "0",
        "2",
    }
    assert ax.get_lines()[0].get_ydata()[0] == 25, "the second layer begins behind 5 x 4 weights and 5 biases"


def test_images_of_kernels_name_outputs():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader, other=case.loader[:1])
    ax = plot.matrix(k)
    assert np.array_equal(np.asarray(ax.get_images()[0].get_array()), k.to_dense().numpy())
    assert {t.get_text() for t in ax.get_xticklabels()} == {"output 0", "output 1", "output 2"}
    assert max(line.get_xdata()[0] for line in ax.get_lines()) < k.shape[1]


def test_large_images_keep_the_largest_entries(monkeypatch):
    monkeypatch.setattr("nngeom.plot.heatmap.PIXELS", 10)
    m = fisher()
    image = np.asarray(plot.matrix(m).get_images()[0].get_array())
    dense = m.to_dense().numpy()  # 43 rows: tiles of 5
    assert image.shape == (9, 9)
    for a in range(9):
        for b in range(9):
            tile = dense[5 * a : 5 * a + 5, 5 * b : 5 * b + 5]
            assert image[a, b] == tile.flat[np.abs(tile).argmax()]


@pytest.mark.parametrize("kind", [*KINDS, nng.PMatImplicit], ids=lambda k: k.__name__)
def test_bars_are_readings_of_the_layers(kind):
    m = fisher("conv2d", kind)
    axes = plot.layers(m)
    blocks = {name: block.to_dense() for name, block in m.by_layer().items()}
    widths = [[patch.get_width() for patch in ax.patches] for ax in axes]
    values = [torch.linalg.eigvalsh(x) for x in blocks.values()]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list(blocks)
    assert np.allclose(widths[0], [float(x.trace()) for x in blocks.values()], rtol=1e-9)
    assert np.allclose(widths[1], [float(v[-1]) for v in values], rtol=1e-5)
    if kind is nng.PMatImplicit:
        assert np.isnan(widths[2]).all() and axes[2].texts[0].get_text() == "known by products only"
    else:
        assert np.allclose(widths[2], [float(effective_rank(v.clamp(min=0))) for v in values], rtol=1e-6)


def test_bars_of_kernels_by_layer():
    case = build("mlp")
    kernels = nng.GramMatrices(case.model, case.loader)
    axes = plot.layers(kernels)
    assert np.allclose([p.get_width() for p in axes[0].patches], [float(k.trace()) for k in kernels.values()])


@pytest.fixture
def scores():
    model = model_of(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    train = [(normal(9, 4), torch.arange(9) % 2)]
    queries, matrix = [(normal(3, 4), torch.arange(3) % 2)], nng.FIM(model, train)
    of = lambda **options: nng.influence(model, train, queries, matrix, loss="cross_entropy", damping=0.1, **options)
    return of(), of(top=4)


def test_influence_shows_both_ends(scores):
    whole, kept = scores
    ax = plot.influence(whole, 1, top=2)
    row = whole.scores[1]
    order = row.argsort(descending=True)
    ends = [*order[:2].tolist(), *order[-2:].tolist()]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(i) for i in ends]
    assert np.allclose([p.get_width() for p in ax.patches], row[ends].numpy())
    ax = plot.influence(whole.scores, 1, top=20, names=[f"x{i}" for i in range(9)])
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"x{i}" for i in order.tolist()]
    ax = plot.influence(kept, 1, top=3)
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(i) for i in order[:3].tolist()]


def test_axes_are_those_given():
    m = fisher()
    _, axes = plt.subplots(1, 3)
    _, rest = plt.subplots(1, 3)
    assert plot.spectrum(m, ax=axes[0]) is axes[0] and plot.matrix(m, ax=axes[1]) is axes[1]
    assert plot.layers(m, axes=rest) is rest and plot.influence(normal(2, 3), ax=axes[2]) is axes[2]


@pytest.mark.parametrize(
    "draw, error, told",
    [
        (lambda m: plot.spectrum(3), nng.ArgumentTypeError, "got int; expected a matrix"),
        (lambda m: plot.spectrum(m, kind="bars"), nng.ArgumentError, "expected one of"),
        (lambda m: plot.spectrum(m, top=0), nng.ArgumentError, "top is 0"),
        (lambda m: plot.spectrum(torch.tensor([float("nan")])), nng.ArgumentError, "not finite"),
        (lambda m: plot.matrix(m.diag()), nng.ArgumentTypeError, "got PVector"),
        (lambda m: plot.matrix(m, scale="root"), nng.ArgumentError, "scale is 'root'"),
        (lambda m: plot.matrix(m, limit=3), nng.SizeError, "limit is 3"),
        (lambda m: plot.layers(torch.ones(2)), nng.ArgumentTypeError, "has no layers"),
        (lambda m: plot.layers(m, axes=[1, 2]), nng.ArgumentError, "got 2 axes"),
        (lambda m: plot.influence(m), nng.ArgumentTypeError, "expected what influence returned"),
        (lambda m: plot.influence(normal(3)), nng.ArgumentTypeError, "expected what influence returned"),
        (lambda m: plot.influence(normal(2, 3), 2), nng.ArgumentError, "there are 2 queries"),
    ],
)
def test_what_cannot_be_drawn(draw, error, told):
    with pytest.raises(error, match=told):
        draw(fisher())


def test_matplotlib_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(nng.MissingExtraError, match="pip install matplotlib"):
        plot.spectrum(torch.ones(2))
