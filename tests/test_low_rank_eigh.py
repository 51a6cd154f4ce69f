"""Eigendecompositions of factors over few rows, beside those of all of the factor in float64."""

import pytest
import torch

from nngeom.core import linalg
from nngeom.core.low_rank_eigh import low_rank_eigh

EPS = torch.finfo(torch.float32).eps


def rows(p: int, r: int, kind: str) -> torch.Tensor:
    """``r`` rows of ``p`` features, in float32."""
    x = torch.randn(r, p, generator=torch.Generator().manual_seed(p + r))
    if kind == "rectified":
        return x.relu()
    if kind == "dead":
        return x.relu() * (torch.arange(p) % 3 > 0)
    if kind == "far":
        return x + 3
    return x * torch.logspace(0, -2, r).unsqueeze(1) if kind == "decaying" else x


def summed(x: torch.Tensor) -> torch.Tensor:
    """Their second moment ``[1, p, p]`` as batches of 16 add up to it."""
    return (sum(part.T @ part for part in x.split(16)) / len(x))[None]


FACTORS = [(300, 20, "plain"), (300, 90, "rectified"), (400, 60, "dead"), (500, 80, "far"), (300, 40, "decaying")]


@pytest.mark.parametrize(("p", "r", "kind"), FACTORS)
def test_is_that_of_the_whole_factor(p, r, kind):
    m = summed(rows(p, r, kind))
    found = low_rank_eigh(m)
    assert found is not None
    values, vectors = found
    whole = torch.linalg.eigvalsh(m.double())
    assert bool((values[0].diff() >= 0).all())
    assert int((values == 0).sum()) >= p - r - 1
    assert float((values - whole).abs().max()) < 2 * EPS * float(whole.max())
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(p)[None], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("p", "r", "kind"), FACTORS)
@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_solves_are_as_exact_as_with_all_of_the_factor(p, r, kind, share, monkeypatch):
    x = rows(p, r, kind)
    m, exact = summed(x), x.double().T @ x.double() / r
    damping = share * float(torch.linalg.eigvalsh(exact)[-1])
    b = torch.randn(p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.solve(exact + damping * torch.eye(p, dtype=torch.float64), b)

    def error() -> float:
        values, vectors = (t.double()[0] for t in linalg.factor_eigh(m))
        return float((vectors @ ((vectors.T @ b) / (values + damping)) - expected).norm() / expected.norm())

    few = error()
    monkeypatch.setattr(linalg, "low_rank_eigh", lambda m: None)
    assert few < 1.5 * error() + 1e-7


def test_zero_is_what_rounding_left():
    values, _ = linalg.factor_eigh(summed(rows(400, 100, "plain")))
    assert int((values > 0).sum()) == 100


REFUSED = {
    "of full rank": lambda: summed(rows(300, 900, "plain")),
    "above a third": lambda: summed(rows(300, 150, "plain")),
    "in float64": lambda: summed(rows(300, 20, "plain")).double(),
    "small": lambda: summed(rows(60, 4, "plain")),
    "of minus a sum": lambda: -summed(rows(300, 20, "plain")),
    "indefinite": lambda: summed(rows(300, 20, "plain")) - summed(rows(300, 21, "plain")),
    "zero": lambda: torch.zeros(1, 300, 300),
    "decaying without end": lambda: summed(rows(300, 300, "plain") * torch.logspace(0, -12, 300)),
    "of groups": lambda: summed(rows(300, 20, "plain")).repeat(2, 1, 1),
    "with a graph": lambda: summed(rows(300, 20, "plain")).requires_grad_(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_left_to_the_whole_decomposition(kind):
    m = REFUSED[kind]()
    found = low_rank_eigh(m)
    if kind == "decaying without end":  # what is left out may be below what counts, or not
        values = torch.linalg.eigvalsh(m.double())
        assert found is None or float((found[0] - values).abs().max()) < 16 * EPS * float(values.max())
    else:
        assert found is None
