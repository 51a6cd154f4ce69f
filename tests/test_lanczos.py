"""Eigenvalues at the ends of the spectrum by Lanczos, against dense ones: clusters, multiples, low rank."""

import pytest
import torch
from cases import STORED, build, representation

import nngeom as nng
from nngeom.solve.lanczos import lanczos

f64 = torch.float64
D = 240
UNIFORM = torch.rand(D, generator=torch.Generator().manual_seed(5), dtype=f64)
SPECTRA = {
    "powers": torch.arange(1, D + 1, dtype=f64) ** -1.5,
    "low rank": torch.cat([torch.linspace(1, 9, 30, dtype=f64), torch.zeros(D - 30, dtype=f64)]),
    "multiples": torch.cat([torch.tensor([9.0] * 5 + [8.0] * 7 + [7.0] * 4 + [-9.0] * 6, dtype=f64), UNIFORM[:-22]]),
    "clusters": torch.cat([10 + 1e-5 * UNIFORM[:10], 5 + 1e-4 * UNIFORM[:20], UNIFORM[:-30]]),
    "both signs": torch.randn(D, generator=torch.Generator().manual_seed(6), dtype=f64),
    "outliers": torch.cat([torch.linspace(2, 60, 8, dtype=f64), 0.2 * UNIFORM[:-8] - 0.1]),
    "one value": torch.full((D,), 2.0, dtype=f64),
    "zero": torch.zeros(D, dtype=f64),
}


def matrix_of(values, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    d = len(values)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=f64))
    m = (q * values) @ q.T
    return (m + m.T) / 2


def start(d, dtype=f64, seed=1):
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(values, k, which):
    down = values.sort(descending=True)[0]
    if which == "smallest":
        return values.sort()[0][:k]
    half = k if which == "largest" else -(-k // 2)
    return torch.cat([down[:half], down[len(down) - (k - half) :]])


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_and_vectors(name, which):
    m = matrix_of(SPECTRA[name])
    scale = float(SPECTRA[name].abs().max())
    for k in (1, 2, 5, 16, 50):
        values, vectors = lanczos(lambda x: m @ x, start(D), k, which)
        torch.testing.assert_close(values, expected(SPECTRA[name], k, which), rtol=0, atol=1e-6 * scale + 1e-12)
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=f64), rtol=0, atol=1e-10)
        residuals = (vectors @ m - values[:, None] * vectors).norm(dim=1)
        assert float(residuals.max()) <= 1e-6 * scale + 1e-12


@pytest.mark.parametrize("k", [D - 1, D])
@pytest.mark.parametrize("name", ["multiples", "low rank", "one value"])
def test_all_of_them(name, k):
    m = matrix_of(SPECTRA[name])
    values, vectors = lanczos(lambda x: m @ x, start(D), k)
    torch.testing.assert_close(values, SPECTRA[name].sort(descending=True)[0][:k], rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=f64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_of_small_sides(d):
    m = matrix_of(torch.arange(d, dtype=f64))
    torch.testing.assert_close(lanczos(lambda x: m @ x, start(d), d, "smallest")[0], torch.arange(d, dtype=f64))


@pytest.mark.parametrize("copies", [2, 9, 30])
def test_every_copy_of_a_multiple_eigenvalue_is_found_once(copies):
    """A start vector sees one direction of each eigenspace; the others come of random ones."""
    values = torch.cat([torch.full((copies,), 3.0, dtype=f64), torch.linspace(0, 1, D - copies, dtype=f64)])
    m = matrix_of(values)
    found, _ = lanczos(lambda x: m @ x, start(D), copies + 3, tol=1e-8)
    torch.testing.assert_close(found[:copies], values[:copies])
    torch.testing.assert_close(found[copies:], values.sort(descending=True)[0][copies : copies + 3])


def test_a_start_without_the_leading_direction():
    values = torch.linspace(0, 1, D, dtype=f64)
    values[0] = 4.0
    first = torch.cat([torch.zeros(1, dtype=f64), torch.ones(D - 1, dtype=f64)])
    found, _ = lanczos(lambda x: values * x, first, 2)
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0], dtype=f64), rtol=0, atol=1e-6)


def test_in_single_precision():
    m = matrix_of(SPECTRA["outliers"]).float()
    values, vectors = lanczos(lambda x: m @ x, start(D, torch.float32), 5)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected(SPECTRA["outliers"], 5, "largest"), rtol=1e-5, atol=0)


def test_products_are_few():
    count = [0]
    m = matrix_of(SPECTRA["powers"])

    def product(x):
        count[0] += 1
        return m @ x

    lanczos(product, start(D), 20)
    assert count[0] <= 90


def test_what_was_reached_is_told():
    m = matrix_of(SPECTRA["both signs"])
    with pytest.raises(nng.ConvergenceError, match=r"relative residual of .* in 12 products for k=10") as caught:
        lanczos(lambda x: m @ x, start(D), 10, max_steps=12)
    values, vectors = caught.value.iterate
    assert values.shape == caught.value.residual.shape == (10,) and vectors.shape == (10, D)
    again = lanczos(lambda x: m @ x, start(D), 10, max_steps=12, strict=False)
    assert torch.equal(again[0], values) and torch.equal(again[1], vectors)
    true = (vectors @ m - values[:, None] * vectors).norm(dim=1)
    scale = caught.value.residual.max() / true.max()
    torch.testing.assert_close(caught.value.residual, scale * true)
    assert bool((values <= SPECTRA["both signs"].max()).all())


@pytest.mark.parametrize("k", [0, -1, D + 1, 2.0, None])
def test_impossible_numbers_of_eigenvalues(k):
    with pytest.raises(nng.ArgumentError, match="expected a whole number between 1 and 240"):
        lanczos(lambda x: x, start(D), k)


def test_bad_arguments():
    with pytest.raises(nng.ArgumentError, match="'middle'; expected one of"):
        lanczos(lambda x: x, start(D), 1, "middle")
    with pytest.raises(nng.ArgumentError, match="max_steps is 3 for k=5"):
        lanczos(lambda x: x, start(D), 5, max_steps=3)
    with pytest.raises(nng.NonFiniteError, match="not finite"):
        lanczos(lambda x: x * float("nan"), start(D), 1)


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("kind", [*STORED, "kfac + diag", "inverse of diag"])
def test_of_every_symmetric_matrix(kind, which):
    case, g = build("mlp", sizes=(3, 4)), torch.Generator().manual_seed(0)
    measured = lambda kind: nng.FIM(case.model, case.loader, representation(kind, case.model))
    if kind == "kfac + diag":
        m = measured("kfac") + measured("diag")
    else:
        m = measured("diag").inverse(0.1) if kind.startswith("inverse") else measured(kind)
    values = torch.linalg.eigvalsh(m.to_dense())
    found, vectors = m.lanczos(4, which, generator=g)
    scale = float(values.abs().max())
    torch.testing.assert_close(found, expected(values, 4, which), rtol=0, atol=1e-6 * scale)
    residuals = m.mv(vectors).flat() - found.unsqueeze(-1) * vectors.flat()
    assert float(residuals.norm(dim=-1).max()) <= 1e-5 * scale
    density = m.spectral_density(8, 2, generator=g)
    assert abs(float(density.expectation(lambda s: s)) - float(values.mean())) < 0.2 * scale


def test_products_of_matrices_say_what_to_do():
    case = build("mlp", sizes=(3, 4))
    k, d = (nng.FIM(case.model, case.loader, kind) for kind in (nng.PMatKFAC, nng.PMatDiag))
    for ask in (lambda m: m.lanczos(2), lambda m: m.spectral_density()):
        with pytest.raises(nng.UnsupportedError, match=r"not symmetric; use torch.linalg.eig"):
            ask(k @ d)
