"""How good an approximation of a matrix is, for what it will be used for: traces, products, solves."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError, ConvergenceError, FileError, SingularError
from nngeom.pmat.operator import ParameterOperator
from nngeom.space.pvector import PVector
from nngeom.views.shown import Frame, Shown, pandas

EXPLICIT_LIMIT, IMPLICIT_LIMIT = 4000, 400  # parameters up to which dense matrices are compared by default


@dataclass(frozen=True, eq=False, repr=False)
class Table(Shown):
    """Named ``rows`` by named ``columns`` of numbers, ``values [rows, columns]``, with ``standard_errors`` over random
    draws (0 where exact).

    A cell is NaN where the measure does not exist (a matrix that is singular at this damping, or too large to be
    dense).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    standard_errors: Tensor

    def __getitem__(self, key: tuple[str, str]) -> float:
        """``table[row, column]``."""
        row, column = key
        return float(self.values[self._index(self.rows, row), self._index(self.columns, column)])

    @staticmethod
    def _index(names: tuple[str, ...], name: str) -> int:
        if name not in names:
            raise ArgumentError(f"no {name!r} in this table; it has {list(names)}")
        return names.index(name)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """``{row: {column: value}}``."""
        return {row: dict(zip(self.columns, line)) for row, line in zip(self.rows, self.values.tolist())}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write values and standard errors as one CSV file, ``path``; raises :class:`FileError` where that is
        impossible.
        """
        try:
            with open(path, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["", *self.columns, *(f"{c} (standard error)" for c in self.columns)])
                for row, line, errors in zip(self.rows, self.values.tolist(), self.standard_errors.tolist()):
                    writer.writerow([row, *line, *errors])
        except OSError as error:
            raise FileError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from error

    def frames(self) -> Iterator[Frame]:
        """The one table of values."""
        told = lambda x: "-" if math.isnan(x) else f"{x:.3g}"
        lines = [[row, *map(told, line)] for row, line in zip(self.rows, self.values.tolist())]
        yield Frame(["", *self.columns], lines, numbers=len(self.columns), rule=True)

    def to_pandas(self) -> Any:
        """The values as a ``pandas.DataFrame``; raises :class:`MissingExtraError` without pandas."""
        return pandas().DataFrame(self.values.numpy(), index=list(self.rows), columns=list(self.columns))


def approximation_report(
    M: ParameterOperator | Mapping[str, ParameterOperator],
    reference: ParameterOperator,
    *,
    dampings: Sequence[float] | None = None,
    draws: int = 10,
    seed: int = 0,
    dense_limit: int | None = None,
) -> Table:
    """The accuracy of one or several matrices (``{name: matrix}``) against a ``reference`` ``F``, as a :class:`Table`.

    Columns, each the mean over ``draws`` vectors ``v`` uniform on the sphere (the same for every matrix, drawn with
    ``seed``): ``trace`` ``|tr M - tr F| / |tr F|``; ``quadratic`` ``|v^T M v - v^T F v| / |v^T F v|``; ``forward cos``
    and ``forward residual``, ``cos(F v, M v)`` and ``|F v - M v| / |F v|``; for every damping ``x``, with ``u = (M + x
    I)^-1 (F + x I) v``, ``solve cos x`` and ``solve residual x``, ``cos(v, u)`` and ``|v - u| / |u|``; ``frobenius``
    ``|M - F| / |F|`` where there are at most ``dense_limit`` parameters (by default 4000, or 400 where a matrix is
    implicit and its columns are products), else NaN. ``dampings`` are numbers, by default 0.01, 0.1, 1 and 10 times the
    mean eigenvalue of ``F``. A matrix that cannot be solved with at some damping (singular, indefinite, no convergence)
    has NaN there.

    Raises :class:`CollectionError` for matrices over different parameters, :class:`ArgumentError` for bad options.
    Source: George 2023, thesis, section 3.4.1.
    """
    matrices = dict(M) if isinstance(M, Mapping) else {type(M).__name__: M}
    for name, m in (("reference", reference), *matrices.items()):
        if not isinstance(m, ParameterOperator):
            raise ArgumentTypeError(f"{name} is {type(m).__name__}; expected a parameter-space matrix")
        reference.layer_collection.require(m.layer_collection, f"the matrix {name!r}")
    if not matrices or draws < 1:
        raise ArgumentError(f"got {len(matrices)} matrices and draws={draws}; expected at least one of each")
    trace = float(reference.trace())
    if dampings is None:
        dampings = [x * abs(trace) / reference.shape[0] for x in (0.01, 0.1, 1.0, 10.0)]
    checked = [as_damping(x) for x in dampings]
    if not all(isinstance(x, Tikhonov) for x in checked):
        raise ArgumentError("dampings are numbers here: the reference is damped by Tikhonov's x I")
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(draws, reference.shape[0], generator=generator, dtype=torch.float64).to(reference.device)
    v = (v / v.norm(dim=1, keepdim=True)).to(reference.dtype)
    fv = reference.product(v)
    if dense_limit is None:
        by_model = any(m.held for m in (reference, *matrices.values()))  # columns are passes of a model
        dense_limit = IMPLICIT_LIMIT if by_model else EXPLICIT_LIMIT
    dense = reference.to_dense() if reference.shape[0] <= dense_limit else None
    lines = [_measures(m, v, fv, trace, [float(x.value) for x in checked], dense) for m in matrices.values()]
    cells = [[_mean(x) for x in line.values()] for line in lines]
    values, errors = (torch.tensor([[cell[j] for cell in line] for line in cells], dtype=torch.float64) for j in (0, 1))
    return Table(tuple(matrices), tuple(lines[0]), values, errors)


def _measures(
    m: ParameterOperator, v: Tensor, fv: Tensor, trace: float, dampings: list[float], dense: Tensor | None
) -> dict[str, Tensor]:
    """``{column: one number a draw, or one number}``."""
    mv = m.product(v.to(m.dtype)).to(v)
    quadratic = (v * fv).sum(-1)
    out = {
        "trace": (torch.as_tensor(float(m.trace()), dtype=torch.float64) - trace).abs() / abs(trace),
        "quadratic": ((v * mv).sum(-1) - quadratic).abs() / quadratic.abs(),
        "forward cos": torch.cosine_similarity(fv, mv, eps=0.0),
        "forward residual": (fv - mv).norm(dim=-1) / fv.norm(dim=-1),
    }
    for x in dampings:
        u = _solved(m, fv + x * v, x)
        out[f"solve cos {x:.2g}"] = torch.cosine_similarity(v, u, eps=0.0)
        out[f"solve residual {x:.2g}"] = (v - u).norm(dim=-1) / u.norm(dim=-1)
    out["frobenius"] = (
        torch.tensor(math.nan) if dense is None else (m.to_dense().to(dense) - dense).norm() / dense.norm()
    )
    return out


def _solved(m: Any, b: Tensor, damping: float) -> Tensor:
    try:
        return m.solve(PVector(m.layer_collection, b.to(m.dtype)), damping).flat().to(b)
    except (SingularError, ConvergenceError):
        return torch.full_like(b, math.nan)


def _mean(x: Tensor) -> tuple[float, float]:
    x = x.double()
    return float(x.mean()), float(x.std() / x.numel() ** 0.5) if x.numel() > 1 else 0.0
