"""A matrix of blocks and rows of low rank beside: ``P = B + R^T S R`` by the Woodbury identity, never ``d x d``.

With ``C = S + R B^-1 R^T`` (``S`` is its own inverse) and the damping in ``B``: ``P^-1 = B^-1 - B^-1 R^T C^-1 R B^-1``
and ``det P = det B |det C|``. ``P`` is positive definite where ``B`` is and ``C`` has as many positive eigenvalues as
``S`` (Haynsworth 1968).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.errors import SingularError
from nngeom.core.lu import lu
from nngeom.pmat.eigenvalues import rounding
from nngeom.pmat.regroup import Rows


@dataclass(frozen=True, eq=False)
class Bordered:
    """``P`` with ``solve_base`` of ``B``, and ``solved`` rows ``R B^-1 [m, d]``."""

    solve_base: Callable[[Tensor], Tensor]
    rows: Rows
    solved: Tensor
    c: Tensor  # [m m]

    @staticmethod
    def of(solve_base: Callable[[Tensor], Tensor], rows: Rows) -> Bordered:
        """Raises :class:`SingularError` where ``P`` is not positive definite, given that ``B`` is."""
        solved = solve_base(rows.r)
        inner = rows.r @ solved.T
        c = (inner + inner.T) / 2 + torch.diag(rows.signs)
        values = torch.linalg.eigvalsh(c.detach().double()).to(c)
        positive = int((values > rounding(values)).sum())
        if positive != int((rows.signs > 0).sum()) or bool((values.abs() <= rounding(values)).any()):
            raise SingularError("the sum is singular or indefinite at this damping; use a larger one")
        return Bordered(solve_base, rows, solved, c)

    def solve(self, b: Tensor) -> Tensor:
        """``P^-1 b``, ``[*b, d]``."""
        return self.corrected(self.solve_base(b), b @ self.solved.T)

    def corrected(self, x: Tensor, along: Tensor) -> Tensor:
        """``x - B^-1 R^T C^-1 along``."""
        flat = along.reshape(-1, len(self.c))
        inner = torch.linalg.lu_solve(*lu(self.c, "the rows of a sum"), flat.T).T
        result: Tensor = x - inner.view(along.shape) @ self.solved
        return result

    def logdet(self) -> Tensor:
        """``log |det C|``, what is added to that of ``B``."""
        result: Tensor = torch.linalg.slogdet(self.c.double())[1].to(self.c)
        return result

    def draw(self, x: Tensor, noise: Tensor) -> Tensor:
        """Of ``N(0, P^-1)`` from ``x`` of ``N(0, B^-1)`` and white ``noise [*b, m]``, where all signs are positive."""
        return self.corrected(x, x @ self.rows.r.T + noise)
