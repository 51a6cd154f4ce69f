"""A kernel known by its products, ``K f = J (J'^T f)``: nothing stored but the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ConvergenceError, UnsupportedError
from nngeom.core.linear import identity, solution
from nngeom.fmat.columns import C, HasColumns, by_columns, has_columns
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.estimated import EstimatedKernel, told_of
from nngeom.fmat.jacobian_products import pull, push
from nngeom.fmat.passes import kept_passes
from nngeom.fmat.products import EVERYTHING, Mean, build, squared_norms
from nngeom.fmat.ring import gathered_kernels
from nngeom.fmat.side import Side
from nngeom.ranks.team import Team
from nngeom.solve.iterative import iterative
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMatImplicit(EstimatedKernel):
    """``scale * J J'^T`` by products; keeps the model and the batches, and is not picklable.

    ``left``, ``right``: the examples that are its rows and columns; ``centered``: the mean gradient of ``reference``
    (by default the left side) is subtracted from both.
    """

    left: Side
    right: Side
    centered: bool = False
    scale: float | Tensor = 1.0
    reference: Side | None = None  # whose mean gradient is subtracted; the left side by default

    @property
    def team(self) -> Team:
        return self.left.run.team

    @property
    def outputs(self) -> int:
        return self.left.outputs

    @property
    def rows(self) -> int:
        return self.left.everywhere

    @property
    def columns(self) -> int:
        return self.right.everywhere

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def T(self) -> FMatImplicit:
        return FMatImplicit(self.right, self.left, self.centered, self.scale, self._reference)

    @property
    def _reference(self) -> Side:
        return self.reference or self.left

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def product(self, f: Tensor) -> Tensor:
        return self.scale * self._unscaled(f)

    def _unscaled(self, f: Tensor) -> Tensor:
        """With centring, ``(J - 1 mu)(J' - 1 mu)^T f``, the mean gradient by one more product with the reference
        examples.
        """
        pulled = pull(self.right, f)
        if not self.centered:
            return push(self.left, pulled)
        base = self._reference
        mean = f.sum(-1, keepdim=True).expand(*f.shape[:-1], base.everywhere) / base.everywhere
        pulled = pulled - pull(base, mean)
        pushed = push(self.left, pulled)
        over = pushed if base is self.left else push(base, pulled)
        return pushed - over.mean(-1, keepdim=True)

    # -- exact numbers -------------------------------------------------------------------------------------------------

    def vTMv(self, f: FVector) -> Tensor:
        """``f^T K f = |J^T f|**2``, by the pull-back alone."""
        if self.left is not self.right or self.centered:
            return super().vTMv(f)
        return self.scale * pull(self.left, self.operand(f, self.columns)).square().sum(-1)

    def exact_diagonal(self) -> Tensor:
        if self.left is not self.right:
            return self.materialize().diag().tensor
        with torch.no_grad(), self.left.within():
            if self.left.places is not None:
                kernels = gathered_kernels(FMatDiag, self.left, None, EVERYTHING, centered=self.centered)
                return self.scale * kernels[""].tensor
            mean = Mean.over(self._reference) if self.centered else None
            squares = squared_norms(self.left, EVERYTHING, mean)[""]
        return self.scale * squares

    def materialize(self, representation: Any = FMatDense) -> Any:
        """The same kernel in a ``representation`` that holds its entries, such as :class:`FMatDense`."""
        if self.centered and self._reference is not self.left:
            return self.T.materialize(representation).T
        with torch.no_grad(), self.left.within():
            right = None if self.left is self.right else self.right
            make = build if self.left.places is None else gathered_kernels
            kernel = make(representation, self.left, right, EVERYTHING, centered=self.centered)[""]
        return self.scale * kernel

    # -- what it solves and estimates ----------------------------------------------------------------------------------

    @property
    def is_symmetric(self) -> bool:
        return self.left is self.right

    def solve(
        self,
        f: HasColumns[C],
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        *,
        x0: FVector | None = None,
        strict: bool = True,
        indefinite: bool = False,
    ) -> C:
        """``(K + damping I)^-1 f`` by conjugate gradients to a relative residual ``tol``.

        ``max_steps``: products at most (by default ten times the side, at most 10 000). ``x0``: a first guess, of the
        shape of ``f``. ``indefinite``: by MINRES, for multiples of kernels with negative eigenvalues. Differentiable in
        ``f`` and ``damping``. Raises :class:`ConvergenceError` when ``tol`` is not reached, whose ``iterate`` and
        ``residual`` hold what was; ``strict=False`` returns that instead.
        """
        if has_columns(f):
            options: dict[str, Any] = {"strict": strict, "indefinite": indefinite}
            return cast(C, by_columns(self, f, lambda u: self.solve(u, damping, tol, max_steps, x0=x0, **options)))
        self.require_symmetric("solve")
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError(
                "an implicit kernel takes a number as damping: Cutoff needs a factorisation, materialize() first"
            )
        given = self.operand(f, self.columns)
        terms = [(self.scale, self.flat_product(self._unscaled)), (d.value, identity)]
        guess = None if x0 is None else self.operand(x0, self.columns).flatten(-2)
        solver = iterative(tol, max_steps, None, guess, strict=strict, indefinite=indefinite)
        try:
            with kept_passes():
                x = solution(solver, terms, given.flatten(-2), self.left.parameters)
        except ConvergenceError as error:
            error.iterate = FVector(error.iterate.view(given.shape))
            raise
        return cast(C, FVector(x.view(given.shape)))

    def inverse(self, damping: float | Tensor | Damping = 0.0) -> FMatDense:
        """``(K + damping I)^-1`` of the dense kernel."""
        self.require_symmetric("inverse")
        return self.materialize().inverse(damping)

    def __repr__(self) -> str:
        return super().__repr__() + told_of(self.team)

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "an implicit kernel holds a model and data, so it is not pickled; materialize() it first"
        )
