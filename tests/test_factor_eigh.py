"""Eigendecompositions of float32 factors: accepted in float32 only when they are decompositions."""

import pytest
import torch

from nngeom.core import linalg


def factor(p: int, rank: int) -> torch.Tensor:
    """A covariance of given rank, one group."""
    x = torch.randn(rank, p, generator=torch.Generator().manual_seed(0))
    return (x.T @ x / rank)[None]


def require_decomposition(m, values, vectors):
    p = m.shape[-1]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(p)[None], rtol=0, atol=1e-5)
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    assert float((rebuilt - m).norm() / m.norm()) < 1e-4
    assert bool((values >= 0).all())


@pytest.mark.parametrize(("p", "rank"), [(128, 200), (300, 40), (200, 1)])
def test_float32_factors(p, rank):
    m = factor(p, rank)
    values, vectors = linalg.factor_eigh(m)
    require_decomposition(m, values, vectors)
    assert int((values > 0).sum()) == min(p, rank)


@pytest.mark.parametrize("fault", ["raises", "garbage"])
def test_float64_has_the_last_word(monkeypatch, fault):
    real, seen = torch.linalg.eigh, []

    def eigh(x):
        seen.append(x.dtype)
        if x.dtype == torch.float32 and fault == "raises":
            raise RuntimeError("failed to converge")
        values, vectors = real(x)
        return (values, torch.roll(vectors, 1, -1)) if x.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    m = factor(128, 40)
    values, vectors = linalg.factor_eigh(m)
    assert seen == [torch.float32, torch.float64]
    require_decomposition(m, values, vectors)
