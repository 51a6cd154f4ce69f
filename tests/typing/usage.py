"""A user's file that type checkers accept as it stands: what measures, operations and maps are said to return.

It is checked, not run: ``mypy --strict`` in the tests, ``basedpyright`` in ``make check``.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import nngeom as nng
from nngeom.pmat.operator import ParameterOperator
from nngeom.solve.hutchinson import Estimate


def measures(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    assert_type(nng.FIM(model, loader), nng.PMatKFAC)
    assert_type(nng.FIM(model, loader, nng.PMatEKFAC), nng.PMatEKFAC)
    assert_type(nng.FIM(model, loader, nng.PMatKFAC, sharing="reduce", likelihood="gaussian"), nng.PMatKFAC)
    assert_type(nng.FIM(model, loader, nng.PMatKFAC.options(sharing="reduce")), nng.PMatKFAC)
    assert_type(nng.FIM(model, loader, nng.PMatImplicit), nng.PMatImplicit)
    assert_type(nng.FIM_MonteCarlo(model, loader), nng.PMatKFAC)
    assert_type(nng.FIM_MonteCarlo(model, loader, nng.PMatLowRank, samples=3), nng.PMatLowRank)
    assert_type(nng.EmpiricalFIM(model, loader, loss="cross_entropy"), nng.PMatKFAC)
    assert_type(nng.EmpiricalFIM(model, loader, nng.PMatQuasiDiag, loss=nn.CrossEntropyLoss()), nng.PMatQuasiDiag)
    assert_type(nng.GGN(model, loader, loss="cross_entropy"), nng.PMatKFAC)
    assert_type(nng.GGN(model, loader, nng.PMatDiag, loss="cross_entropy", memory_budget=2**20), nng.PMatDiag)
    assert_type(nng.Hessian(model, loader, loss="cross_entropy"), nng.PMatImplicit)
    assert_type(nng.Hessian(model, loader, nng.PMatDense, loss="cross_entropy"), nng.PMatDense)
    assert_type(nng.GradientCovariance(model, loader, loss="cross_entropy"), nng.PMatLowRank)
    assert_type(nng.GradientCovariance(model, loader, nng.PMatDiag, loss="cross_entropy"), nng.PMatDiag)
    assert_type(nng.FIM(model, loader, nng.PMatEKFAC).rescaled(model, loader), nng.PMatEKFAC)


def estimates(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], v: nng.PVector) -> None:
    assert_type(nng.FIM(model, loader, estimator="rademacher"), nng.MatrixEstimate)
    assert_type(nng.FIM(model, loader, nng.PMatDiag, estimator="rademacher", samples=4), nng.MatrixEstimate)
    assert_type(nng.GGN(model, loader, nng.PMatImplicit, loss="mse", estimator="rademacher"), nng.MatrixEstimate)
    assert_type(nng.FIM(model, loader, estimator="rademacher").vTMv(v), Estimate)
    assert_type(nng.GramMatrix(model, loader, nng.FMatDiag, estimator="rademacher", samples=4).trace(), Estimate)
    assert_type(nng.GramMatrix(model, loader, estimator="rademacher").kernel, nng.FMatDense)


Kind = type[nng.PMatDense] | type[nng.PMatDiag]


def any_kind(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], kind: Kind) -> float:
    parts = {"0.*": nng.PMatDense, "*": nng.PMatKFAC.options(sua=True)}
    mixed = nng.FIM(model, loader, nng.PMatMixed(parts, default=nng.PMatDiag))
    assert_type(mixed, nng.PMatMixed)
    matrices: list[ParameterOperator] = [nng.FIM(model, loader, kind), mixed, nng.FIM(model, loader, nng.PMatImplicit)]
    return sum(float(m.trace()) for m in matrices)


def operations(m: nng.PMatKFAC, v: nng.PVector, j: nng.PushForwardDense, n: nng.PMatDiag) -> None:
    assert_type(m.mv(v), nng.PVector)
    assert_type(m @ v, nng.PVector)
    assert_type(m @ j, nng.PushForwardDense)
    assert_type(m.solve(v), nng.PVector)
    assert_type(m.solve(v, 1e-3), nng.PVector)
    assert_type(m.solve(j, damping=nng.FactoredTikhonov(1e-3)), nng.PushForwardDense)
    assert_type(m.inverse(torch.tensor(0.1)).solve(v), nng.PVector)
    assert_type(m.vTMv(v), Tensor)
    assert_type(m.trace(), Tensor)
    assert_type(m.diag(), nng.PVector)
    assert_type(m.norm(), Tensor)
    assert_type(m.logdet(1e-3), Tensor)
    assert_type(m.sample(3, 1e-3), nng.PVector)
    assert_type(m.to_dense(), Tensor)
    assert_type(m.layer_collection, nng.LayerCollection)
    assert_type(m.dtype, torch.dtype)
    assert_type(m.to(torch.float64), nng.PMatKFAC)
    assert_type(m.detach(), nng.PMatKFAC)
    values, basis = m.eigh()
    assert_type(values, Tensor)
    assert_type(basis.T.mv(v), nng.PVector)
    assert_type(basis.mv(values), Tensor)
    assert_type(m["0"], nng.PMatKFAC)
    assert_type(m.by_layer(), dict[str, nng.PMatKFAC])
    assert_type(m.power(-0.5).solve(v, 1e-3, indefinite=True), nng.PVector)
    assert_type((m**-0.5).mv(v), nng.PVector)
    assert_type(nng.PMatDiag.from_vector(v), nng.PMatDiag)
    assert_type(2 * m / 3, nng.PMatKFAC)
    assert_type(-m, nng.PMatKFAC)
    assert_type(m + n, ParameterOperator)
    assert_type(m - n, ParameterOperator)
    assert_type(m @ n, ParameterOperator)
    assert_type((m + n).solve(v, 1e-3), nng.PVector)
    assert_type((m @ n).to(torch.float64).trace(), Tensor)
    assert_type(nng.merge(m, m).diag(), nng.PVector)


def vectors(model: nn.Module, v: nng.PVector, f: nng.FVector) -> None:
    assert_type(nng.PVector.from_model(model), nng.PVector)
    assert_type((2 * v + v - v / 3).dot(-v), Tensor)
    assert_type(v.flat(), Tensor)
    assert_type(v["0.weight"], Tensor)
    assert_type(v.norm(), Tensor)
    assert_type((0.5 * f - f).dot(f), Tensor)
    total = sum([v, v])
    assert total != 0
    assert_type(total, nng.PVector)


def function_space(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], f: nng.FVector, v: nng.PVector) -> None:
    k = nng.GramMatrix(model, loader)
    assert_type(k, nng.FMatDense)
    assert_type(nng.GramMatrix(model, loader, nng.FMatDiag), nng.FMatDiag)
    assert_type(nng.GramMatrix(model, loader, nng.FMatImplicit, other=loader), nng.FMatImplicit)
    assert_type(nng.GramMatrix(model, loader, sharded=True), nng.FMatSharded)
    assert_type(nng.GramMatrices(model, loader), dict[str, nng.FMatDense])
    assert_type(nng.GramMatrices(model, loader, nng.FMatBlockDiag), dict[str, nng.FMatBlockDiag])
    assert_type(k.tensor, Tensor)
    assert_type(k.T, nng.FMatDense)
    assert_type(k @ f, nng.FVector)
    assert_type(k @ k, nng.FMatDense)
    assert_type(k.solve(f, 1e-3), nng.FVector)
    assert_type(k.eigh(), tuple[Tensor, Tensor])
    assert_type(2 * k, nng.FMatDense)
    assert_type((k + k).trace(), Tensor)
    assert_type((k - k).to(torch.float64).logdet(1.0), Tensor)
    j = nng.Jacobian(model, loader)
    assert_type(j, nng.PushForwardDense)
    assert_type(nng.Jacobian(model, loader, nng.PullBackImplicit), nng.PullBackImplicit)
    assert_type(j.T, nng.PullBackDense)
    assert_type(j @ v, nng.FVector)
    assert_type(j.T @ f, nng.PVector)
    assert_type(j @ j.T, nng.FMatDense)
    assert_type(j.shape, tuple[int, int, int])
    assert_type(k @ j, nng.PushForwardDense)
    assert_type(k.solve(j, 1e-3), nng.PushForwardDense)
    assert_type(k.solve(k, 1.0), nng.FMatDense)
    assert_type(k.inverse(1.0), nng.FMatDense)
    assert_type(j.norm(), Tensor)
    assert_type(j["0.weight"], Tensor)
    assert_type((j.T @ j).vTMv(j), Tensor)
    assert_type((j.T @ j).solve(v, 1e-3), nng.PVector)
    assert_type((j.T @ j).measured(nng.PMatDiag), nng.PMatDiag)
    implicit = nng.Jacobian(model, loader, nng.PushForwardImplicit)
    assert_type(implicit @ implicit.T, nng.FMatImplicit)
    assert_type(implicit.materialize(), nng.PushForwardDense)


def packages(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], k: nng.FMatDense) -> None:
    assert_type(nng.analysis.effective_rank(k), Tensor)
    assert_type(nng.optim.EKFAC(model, lr=0.1), nng.optim.EKFAC)
    assert_type(nng.mgs.metrics(model, loader).trace, Tensor)


def mistakes(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], v: nng.PVector, f: nng.FVector) -> None:
    """Each is an error of the checkers: an ``ignore`` that is not needed is one as well."""
    m = nng.FIM(model, loader)
    m.sovle(v)  # type: ignore[attr-defined]
    m.solve(v.flat())  # type: ignore[type-var]
    m + 1  # type: ignore[operator]
    m * v  # type: ignore[operator]
    nng.FMI(model, loader)  # type: ignore[attr-defined]
    nng.FIM(model, loader, nng.FMatDense)  # type: ignore[type-var]
    nng.FIM(model, loader, estimator="rademacer")  # type: ignore[call-overload]
    nng.FIM(model, loader, progress=1.5)  # type: ignore[call-overload]
    nng.GramMatrix(model, loader, nng.PMatDense)  # type: ignore[type-var]
    nng.GramMatrix(model, loader).mv(v)  # type: ignore[arg-type]
    nng.Jacobian(model, loader) @ f  # type: ignore[operator]
