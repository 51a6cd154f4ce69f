"""Matrices defined by others, lazy, with the same operations as any other; products are here, sums beside.

Products with vectors, traces, diagonals and quadratic forms are exact and never form a matrix. What needs a
factorisation is done on the dense matrix below the size limit; solves above it go by conjugate gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, SingularError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linear import identity, solution
from nngeom.core.lu import lu
from nngeom.pmat.arguments import is_spectral, require_frobenius, require_tikhonov
from nngeom.pmat.basis import Basis
from nngeom.pmat.dense import DenseBlock, PMatDense
from nngeom.pmat.operands import V
from nngeom.pmat.operator import DENSE_LIMIT, ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.solve.iterative import iterative
from nngeom.solve.norm import spectral_norm
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

NORM_LIMIT = 1024  # above, singular values of the dense matrix take longer than Lanczos steps


class PMatExpression(ParameterOperator):
    """A matrix defined by others. Everything the parts do is done by them; the rest on the dense matrix."""

    @property
    def symmetric(self) -> bool:
        """Whether the expression is symmetric by construction."""
        return True

    @abstractmethod
    def trace(self) -> Tensor:
        """``tr M``."""

    def diag(self) -> PVector:
        """The diagonal."""
        return PVector(self.layer_collection, self.to_dense().diagonal())

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm (``kind="fro"``), or the largest singular value (``kind=2``), of the dense matrix; that of
        a large symmetric one by Lanczos' method.
        """
        if is_spectral(kind):
            if self.symmetric and self.shape[0] > NORM_LIMIT:
                return spectral_norm(
                    self.product, None, torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
                )
            largest: Tensor = torch.linalg.matrix_norm(self.to_dense(), 2)
            return largest
        require_frobenius(kind)
        result: Tensor = self.to_dense().norm()
        return result

    def materialize(self, limit: int = DENSE_LIMIT) -> PMat:
        """The same matrix as a :class:`PMatDense`; raises :class:`SizeError` above ``limit`` parameters."""
        if not self.symmetric:
            raise UnsupportedError(
                "a product of matrices is not symmetric, so there is no PMatDense of it; to_dense() gives the tensor"
            )
        span: Layout = self.layer_collection.span()
        return PMatDense.of_blocks(self.layer_collection, {span: DenseBlock(self.to_dense(limit))}, 0)

    def solve(
        self,
        b: V,
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        *,
        indefinite: bool = False,
    ) -> V:
        """``(M + damping I)^-1 b``: dense below the size limit, above it conjugate gradients to a relative residual
        ``tol``, in ``max_steps`` steps at most (by default ten times the side, at most 10 000).

        ``indefinite``: a symmetric matrix may have negative eigenvalues; above the limit by MINRES.
        """
        d = as_damping(damping)
        indefinite = indefinite or getattr(d, "indefinite", False)
        if self.shape[0] <= DENSE_LIMIT:
            if self.symmetric:
                return self.materialize().solve(b, d, indefinite=indefinite)
            return self._apply(lambda x: self._solve_general(x, d), b)
        if not self.symmetric or not isinstance(d, Tikhonov):
            raise UnsupportedError(
                "solving with a product, or with Cutoff or FactoredTikhonov on a sum, needs the dense matrix; "
                "this one is above the size limit"
            )
        solver = iterative(tol, max_steps, indefinite=indefinite)
        return self._apply(lambda x: solution(solver, [*self.terms(), (d.value, identity)], x, self.held), b)

    def _solve_general(self, x: Tensor, damping: Damping) -> Tensor:
        if not isinstance(damping, Tikhonov):
            raise ArgumentError("a product of matrices takes a number as damping")
        result: Tensor = torch.linalg.lu_solve(*self._factorised(damping), x.reshape(-1, x.shape[-1]).T).T.reshape(
            x.shape
        )
        return result

    def _factorised(self, damping: Tikhonov) -> tuple[Tensor, Tensor]:
        m = self.to_dense()
        shifted = m + damping.value * torch.eye(m.shape[0], dtype=m.dtype, device=m.device)
        return lu(shifted, f"the product of matrices with damping {damping.value:g}")

    def inverse(self, damping: float | Tensor | Damping = 0.0, *, indefinite: bool = False) -> PMat:
        """``(M + damping I)^-1`` as a PMatDense; ``indefinite``: with negative eigenvalues too."""
        return self.materialize().inverse(damping, indefinite=indefinite)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(M + damping I)``, ``log |det|`` where ``M`` is not symmetric; ``-inf`` where that is singular."""
        if self.symmetric:
            return self.materialize().logdet(damping)
        try:
            factors, _ = self._factorised(require_tikhonov(damping, "logdet"))
        except SingularError:
            return torch.full((), -torch.inf, dtype=self.dtype, device=self.device)
        return factors.diagonal().abs().log().sum()

    def eigh(self) -> tuple[Tensor, Basis]:
        """Eigenvalues, ascending, and basis, of the dense matrix."""
        return self.materialize().eigh()

    def sample(self, n: int, damping: float | Tensor = 0.0, generator: torch.Generator | None = None) -> PVector:
        """``n`` draws of ``N(0, (M + damping I)^-1)``; ``generator``: torch's global one by default."""
        return self.materialize().sample(n, damping, generator)


@dataclass(frozen=True, eq=False)
class PMatProduct(PMatExpression):
    """``scale * left @ right``: not symmetric in general."""

    left: ParameterOperator
    right: ParameterOperator
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        self.left.layer_collection.require(self.right.layer_collection, "the right factor")

    @property
    def layer_collection(self) -> LayerCollection:
        return self.left.layer_collection

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.left.dtype, self.right.dtype)

    @property
    def device(self) -> torch.device:
        return self.left.device

    def product(self, x: Tensor) -> Tensor:
        inner = self.right.product(x.to(self.right.dtype))
        return self.scale * self.left.product(inner.to(self.left.dtype)).to(self.dtype)

    def trace(self) -> Tensor:
        return self.to_dense().trace()

    def solve(
        self,
        b: V,
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        *,
        indefinite: bool = False,
    ) -> V:
        if as_damping(damping) == Tikhonov(0.0):
            first = self.left.solve(b, 0.0, indefinite=indefinite)
            return self._apply(lambda x: x / self.scale, self.right.solve(first, 0.0, indefinite=indefinite))
        return super().solve(b, damping, tol, max_steps, indefinite=indefinite)

    def inverse(self, damping: float | Tensor | Damping = 0.0, *, indefinite: bool = False) -> PMat:
        raise UnsupportedError("the inverse of a product is not offered as a matrix; use solve(b, damping)")

    def eigh(self) -> tuple[Tensor, Basis]:
        raise UnsupportedError("a product of matrices is not symmetric; use torch.linalg.eig(M.to_dense())")

    def sample(self, n: int, damping: float | Tensor = 0.0, generator: torch.Generator | None = None) -> PVector:
        raise UnsupportedError("a product of matrices is not symmetric, so it is no covariance to sample from")

    @property
    def T(self) -> PMatProduct:
        """The transpose: the factors' in the other order."""
        return PMatProduct(self.right.T, self.left.T, self.scale)

    def scaled(self, c: float | Tensor) -> PMatProduct:
        return PMatProduct(self.left, self.right, c * self.scale)

    def to(self, *args: Any, **kwargs: Any) -> PMatProduct:
        """Another dtype or device, as ``Tensor.to``."""
        return PMatProduct(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs), self.scale)

    def __repr__(self) -> str:
        return f"PMatProduct({self.scale:g} * {self.left!r} @ {self.right!r})"


ParameterOperator.expressions.update(product=PMatProduct)
