"""Eigendecompositions of factors: in float64, with a fallback where LAPACK gives up, and zero only what rounding
left.
"""

import pytest
import torch

from nngeom.core import linalg
from nngeom.core.damping import Tikhonov
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock

EPS = torch.finfo(torch.float32).eps


def factor(p: int, rank: int, seed: int = 0) -> torch.Tensor:
    """A covariance of given rank, one group."""
    x = torch.randn(rank, p, generator=torch.Generator().manual_seed(seed))
    return (x.T @ x / rank)[None]


def with_spectrum(values: torch.Tensor) -> torch.Tensor:
    """A random factor with these eigenvalues, rounded to float32."""
    q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    return ((q * values) @ q.T).float()[None]


def require_decomposition(m, values, vectors):
    p = m.shape[-1]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(p)[None], rtol=0, atol=1e-5)
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    assert float((rebuilt - m).norm() / m.norm()) < 1e-6
    assert bool((values >= 0).all())


@pytest.mark.parametrize(("p", "rank"), [(20, 4), (128, 200), (300, 40), (200, 1)])
def test_float32_factors(p, rank):
    m = factor(p, rank)
    values, vectors = linalg.factor_eigh(m)
    require_decomposition(m, values, vectors)
    assert int((values > 0).sum()) == min(p, rank)


def test_zeros_stay_zeros_over_many_batches():
    basis = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    total = 0
    for seed in range(1000):
        x = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)) @ basis
        total = total + x.T @ x
    assert int((linalg.factor_eigh(total[None])[0] > 0).sum()) == 5


SPECTRA = {
    "decaying": torch.logspace(0, -5, 300, dtype=torch.float64),
    "clustered": torch.cat([torch.ones(150), torch.full((150,), 1e-4)]).double(),
    "rank-deficient": torch.cat([torch.logspace(0, -3, 80), torch.zeros(220)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2])
def test_readings_are_those_of_float64(name, damping):
    """Solves and log-determinants with float32 factors, against float64 of the same numbers; a float32 decomposition is
    20 to 1000 times farther.
    """
    a, g = with_spectrum(SPECTRA[name]), with_spectrum(SPECTRA[name][::10])
    block, wide = KroneckerBlock(a, g), [torch.linalg.eigh(f.double()) for f in (a, g)]
    (sa, ua), (sg, ug) = ((v.clamp_min(0), u) for v, u in wide)
    truth = EigenBlock(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2))
    b = torch.randn(1, 30, 300, generator=torch.Generator().manual_seed(2))
    x, y = block.solve(b, Tikhonov(damping)), truth.inverse(Tikhonov(damping)).mv(b.double())
    left = {
        "decaying": 2 * linalg.ROUNDINGS,
        "clustered": 0,
        "rank-deficient": 1,
    }  # roundings of what counts as zero here
    rounding = 20 * EPS + left[name] * EPS / damping
    assert float((x - y).norm() / y.norm()) < rounding
    assert float((block.logdet(Tikhonov(damping)) - truth.logdet(Tikhonov(damping))).abs() / truth.d.numel()) < rounding


@pytest.mark.parametrize("failures", [1, 2])
def test_where_lapack_does_not_converge(monkeypatch, failures):
    """The second try has a shifted diagonal, the third is a singular value decomposition."""
    real, seen = torch.linalg.eigh, []

    def eigh(x):
        seen.append(x.dtype)
        if len(seen) <= failures:
            raise RuntimeError("failed to converge")
        return real(x)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    m = factor(128, 40)
    values, vectors = linalg.factor_eigh(m)
    assert seen == [torch.float64] * 2
    require_decomposition(m, values, vectors)
