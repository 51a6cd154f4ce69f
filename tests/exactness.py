"""One model against plain autograd loops, in every kind of object: what is exact by definition must be equal."""

from __future__ import annotations

import reference
import torch
from cases import DIAGONAL, TRACE, WHOLE, representation
from torch import Tensor, nn

import nngeom as nng

RANDOM = torch.Generator()


def close(got: Tensor, expected: Tensor, tol: float = 1e-9) -> None:
    """Equal up to rounding, relative to the largest entry."""
    torch.testing.assert_close(
        got, expected, rtol=tol, atol=tol * max(1e-3, float(expected.abs().max()) if expected.numel() else 0.0)
    )


def require_exact(model: nn.Module, x: Tensor, tol: float = 1e-9, rows=None, hessian: bool = True) -> None:
    """Matrices, kernels and maps of all kinds on ``x`` in two batches, against loops, or ``rows`` made otherwise."""
    require_matrices(model, x, tol, rows)
    require_kernels(model, x, tol, rows)
    if hessian:
        y = torch.arange(len(x)) % 3
        h = reference.hessian(model, x, y, lambda f, y: nn.functional.cross_entropy(f, y, reduction="none"))
        close(nng.Hessian(model, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense(), h, tol)


def batches(x: Tensor) -> list[tuple[Tensor, ...]]:
    """Two ragged ones."""
    cut = len(x) // 2 + 1
    return [(x[:cut],), (x[cut:],)]


def require_matrices(model: nn.Module, x: Tensor, tol: float = 1e-9, rows=None) -> None:
    """The exact Fisher matrix: whole, blocks, diagonals, traces, products."""
    j = reference.jacobian(model, x) if rows is None else rows
    f = reference.sandwich(j, reference.softmax_metric(model(x)))
    measured = {name: nng.FIM(model, batches(x), representation(name, model)) for name in (*TRACE, "kfac")}
    implicit, kfac = measured.pop("implicit"), measured.pop("kfac")
    for name, m in measured.items():
        if name in WHOLE:
            close(m.to_dense(), f, tol)
        elif name in DIAGONAL:
            close(m.diag().flat(), f.diagonal(), tol)
        else:
            close(m.trace(), f.trace(), tol)
    v = nng.PVector.randn(kfac.layer_collection, dtype=f.dtype)
    close(kfac.mv(kfac.solve(v, 0.1)).flat() + 0.1 * kfac.solve(v, 0.1).flat(), v.flat(), 1e-6)
    close(implicit.mv(v).flat(), f @ v.flat(), tol)
    close(implicit.diag().flat(), f.diagonal(), tol)


def require_kernels(model: nn.Module, x: Tensor, tol: float = 1e-9, rows=None) -> None:
    """The tangent kernel and the Jacobian in every representation."""
    j = reference.jacobian(model, x) if rows is None else rows
    c, n, _ = j.shape
    k = torch.einsum("cnd,emd->cnem", j, j)
    measure = lambda kind: nng.GramMatrix(model, batches(x), kind)
    close(measure(nng.FMatDense).tensor, k, tol)
    close(measure(nng.FMatDiag).tensor, torch.einsum("cncn->cn", k), tol)
    f = nng.FVector(torch.randn(c, n, dtype=x.dtype if x.is_floating_point() else k.dtype))
    close(measure(nng.FMatImplicit).mv(f).tensor, torch.einsum("cnem,em->cn", k, f.tensor), tol)
    dense = nng.Jacobian(model, batches(x))
    close(dense.tensor, j, tol)
    implicit = nng.Jacobian(model, batches(x), nng.PushForwardImplicit)
    v = nng.PVector.randn(dense.layer_collection, dtype=k.dtype)
    close(implicit.mv(v).tensor, torch.einsum("cnd,d->cn", j, v.flat()), tol)
    close(implicit.T.mv(f).flat(), torch.einsum("cnd,cn->d", j, f.tensor), tol)
    close(sum(g.to_dense() for g in nng.GramMatrices(model, batches(x)).values()), k.flatten(0, 1).flatten(1), tol)
