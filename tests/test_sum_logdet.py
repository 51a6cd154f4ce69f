"""Estimated log-determinants of large sums: against dense ones, with standard errors that hold."""

import functools

import pytest
import torch
from torch import nn

import nngeom as nng
from nngeom.solve.hutchinson import Estimate

f64 = torch.float64


@functools.cache
def matrices():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(22, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    tasks = [[(torch.randn(30, 22, dtype=f64) * torch.rand(22, dtype=f64),)] for _ in range(3)]
    kinds = (nng.PMatKFAC, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag)
    f, g, e, d = (nng.FIM(model, tasks[j % 3], kind) for j, kind in enumerate(kinds))
    rows = nng.FIM(model, tasks[0], nng.PMatLowRank)
    implicit = nng.FIM(model, tasks[0], nng.PMatImplicit)
    return {"two": f + g, "with eigenbasis": f + e, "with diagonal": 2.0 * f + d, "three": f + g + e,
            "rows": f + g + rows, "implicit": d + implicit}  # fmt: skip


def exact(m, x):
    dense = m.to_dense()
    return torch.linalg.slogdet(dense + x * torch.eye(len(dense), dtype=f64))[1]


@pytest.mark.parametrize("damping", [1e-3, 0.1, torch.tensor(0.05, dtype=f64)])
@pytest.mark.parametrize("name", ["two", "with eigenbasis", "with diagonal", "three", "implicit"])
def test_estimates(name, damping):
    m = matrices()[name]
    steps = 64 if name == "implicit" else 16
    found = [
        m.logdet(damping, estimator="slq", steps=steps, generator=torch.Generator().manual_seed(s)) for s in range(6)
    ]
    errors = torch.stack([(e.value - exact(m, float(damping))) / e.standard_error for e in found])
    assert isinstance(found[0], Estimate) and bool((errors.abs() < 5).all())
    assert float(errors.square().mean()) < 6
    assert all(float(e.standard_error) < 0.02 * abs(float(e)) for e in found)
    assert float(m.logdet(damping, estimator="slq", steps=steps, generator=torch.Generator().manual_seed(0))) == float(
        found[0]
    )


def test_closed_blocks_have_no_error():
    m = matrices()["two"]
    inner = m["2"]
    found = inner.logdet(0.1, estimator="slq")
    assert float(found.standard_error) == 0
    torch.testing.assert_close(found.value, inner.logdet(0.1))


def test_more_samples_are_nearer():
    m = matrices()["with diagonal"]
    few, many = (
        m.logdet(1e-3, estimator="slq", steps=32, samples=k, generator=torch.Generator().manual_seed(0))
        for k in (4, 256)
    )
    assert float(many.standard_error) < float(few.standard_error)


def test_errors():
    m = matrices()
    with pytest.raises(nng.ArgumentError, match="expected 'slq'"):
        m["two"].logdet(0.1, estimator="xtrace")
    with pytest.raises(nng.UnsupportedError, match="expected no estimator="):
        m["rows"].logdet(0.1, estimator="slq")
    with pytest.raises(nng.SingularError):
        (m["two"] - 3.0 * m["two"].parts[1]).logdet(1e-3, estimator="slq")
    with pytest.raises(nng.ArgumentError):
        m["two"].logdet(nng.Cutoff(0.1), estimator="slq")
