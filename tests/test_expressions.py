"""Lazy sums of matrices of different kinds, above the side at which blocks are made dense too."""

import pytest
import torch
from cases import build

import nngeom as nng
from nngeom.pmat.sum_block import BLOCK_LIMIT

f64 = torch.float64


@pytest.fixture(params=[False, True], ids=["small", "large"])
def limit(request):
    """The longest side of a dense block, above and below those of the models."""
    return 3 if request.param else BLOCK_LIMIT


def sums(case):
    """Sums that no representation holds, with their dense truths."""
    names = (nng.PMatKFAC, nng.PMatDiag, nng.PMatDense, nng.PMatEKFAC)
    kfac, diag, dense, ekfac = (nng.FIM(case.model, case.loader, kind) for kind in names)
    wholes = [m.to_dense() for m in (kfac, diag, dense, ekfac)]
    yield kfac + diag, wholes[0] + wholes[1]
    yield kfac + 2 * ekfac, wholes[0] + 2 * wholes[3]
    yield kfac + diag + dense, wholes[0] + wholes[1] + wholes[2]
    yield 3 * (kfac + diag) - diag, 3 * wholes[0] + 2 * wholes[1]


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
@pytest.mark.parametrize("damping", [0.05, 1.0, 30.0])
def test_solves_of_sums(name, damping, limit):
    case = build(name)
    for lazy, truth in sums(case):
        b = nng.PVector.randn(lazy.layer_collection, 2, dtype=f64, generator=torch.Generator().manual_seed(1))
        shifted = truth + damping * torch.eye(len(truth), dtype=f64)
        x = lazy.solve(b, damping, limit=limit).flat()
        torch.testing.assert_close(
            x, torch.linalg.solve(shifted, b.flat().T).T, rtol=1e-5, atol=1e-6 * float(x.abs().max())
        )
        torch.testing.assert_close(lazy.mv(b).flat(), b.flat() @ truth, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(lazy.trace(), truth.trace())
        torch.testing.assert_close(lazy.diag().flat(), truth.diagonal())


def test_what_needs_a_dense_matrix_says_so_above_the_limit(limit):
    case = build("mlp")
    lazy, _ = next(sums(case))
    b = nng.PVector.randn(lazy.layer_collection, dtype=f64)
    if limit == 3:
        with pytest.raises(nng.SizeError, match="the limit is 3"):
            lazy.solve(b, nng.Cutoff(1e-3), limit=limit)
    else:
        assert torch.isfinite(lazy.solve(b, nng.Cutoff(1e-3)).flat()).all()
