"""Numbers of a kernel that is known by its products: exact where asked, else estimates with their errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ConvergenceError, UnsupportedError
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.passes import kept_passes
from nngeom.pmat.arguments import is_spectral
from nngeom.ranks.team import ALONE, Team
from nngeom.ranks.totals import generator_of
from nngeom.solve.hutchinson import Estimate, hutchinson
from nngeom.solve.lanczos import lanczos
from nngeom.solve.leave_one_out import DIAGONALS, TRACES, estimator_of
from nngeom.solve.slq import require_slq, slq_logdet
from nngeom.space.fvector import FVector


class EstimatedKernel(FunctionOperator):
    """Trace, diagonal, norms, log-determinant and spectrum of a kernel, from its products with vectors."""

    @property
    def team(self) -> Team:
        """The processes that make its products together."""
        return ALONE

    def _draws(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Rank 0's, so that all draw the same vectors."""
        return generator_of(self.team, generator, self.device)

    @property
    @abstractmethod
    def is_symmetric(self) -> bool:
        """Whether it is of one set of examples."""

    @property
    @abstractmethod
    def T(self) -> EstimatedKernel:
        """The transpose."""

    @abstractmethod
    def exact_diagonal(self) -> Tensor:
        """``(c, n)``, of a square kernel."""

    @abstractmethod
    def materialize(self) -> Any:
        """The same kernel with its entries."""

    def require_symmetric(self, what: str) -> None:
        """Raise :class:`ArgumentError` for ``what`` a kernel between two sets of examples does not have."""
        if not self.is_symmetric:
            raise ArgumentError(f"{what} needs a symmetric kernel, of one set of examples; this one is between two")

    def flat_product(self, product: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        """The ``product`` (by default that with the kernel) of flat vectors, ``[*b, c m] -> [*b, c n]``."""
        return lambda z: (product or self.product)(z.unflatten(-1, (self.outputs, self.columns))).flatten(-2)

    @property
    def _like(self) -> Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device)

    def _estimate(
        self, estimator: Callable[..., Estimate], samples: int, generator: torch.Generator | None
    ) -> Estimate:
        with kept_passes():
            return estimator(self.flat_product(), self.shape[0], samples, self._like, self._draws(generator))

    def diag(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """The diagonal, an FVector: exact without products by default, or an :class:`Estimate` of two FVectors.

        ``estimator``: ``"hutchinson"`` or ``"xdiag"``, of ``samples`` products with random signs by ``generator``
        (torch's global one by default).
        """
        self._require_square("diag")
        if estimator is not None:
            self.require_symmetric("an estimated diagonal")
            found = self._estimate(estimator_of("diagonal", DIAGONALS, estimator), samples, generator)
            return Estimate(*(FVector(x.view(self.outputs, -1)) for x in (found.value, found.standard_error)))
        return FVector(self.exact_diagonal())

    def trace(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """``tr K``: exact by default, or an :class:`Estimate` with a standard error.

        ``estimator``: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``, of ``samples`` products with vectors by
        ``generator`` (torch's global one by default); the last of symmetric kernels only.
        """
        if estimator is None:
            return self.diag().tensor.sum()
        chosen = estimator_of("trace", TRACES, estimator)
        self._require_square("trace")
        if estimator == "xtrace":
            self.require_symmetric("XTrace")
        return self._estimate(chosen, samples, generator)

    def norm(
        self, kind: str | int = "fro", samples: int | None = None, generator: torch.Generator | None = None
    ) -> Any:
        """The Frobenius norm (``kind="fro"``): of the dense kernel, or with ``samples`` an :class:`Estimate` from
        products; or the largest singular value (``kind=2``), by Lanczos.

        ``generator``: of the random vectors (torch's global one by default).
        """
        act = self.flat_product()
        if is_spectral(kind):
            back = self.T.flat_product()
            with kept_passes():
                largest, _ = lanczos(lambda z: back(act(z)), self._start(self.shape[1], generator), 1)
            return largest[0].clamp_min(0).sqrt()
        if samples is None:
            return self.materialize().norm(kind)
        self._require_square("an estimated norm")
        with kept_passes():
            square = hutchinson(lambda z: act(act(z)), self.shape[0], samples, self._like, self._draws(generator))
        root = square.value.clamp_min(0).sqrt()
        return Estimate(root, square.standard_error / (2 * root))

    def _start(self, size: int, generator: torch.Generator | None) -> Tensor:
        generator = self._draws(generator)
        device = generator.device if generator is not None else self.device
        return torch.randn(size, generator=generator, dtype=self.dtype, device=device).to(self.device)

    def lanczos(
        self,
        k: int,
        which: str = "largest",
        *,
        tol: float = 1e-6,
        max_steps: int | None = None,
        strict: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, FVector]:
        """``k`` eigenvalues at an end of the spectrum ``(k,)``, and their vectors, a batch of FVectors.

        ``which``: ``"largest"``, descending, ``"smallest"``, ascending, or ``"both"``, half from each end, descending.
        It goes on until residuals are below ``tol`` times the largest absolute eigenvalue; after ``max_steps`` products
        (by default ten times the side, at most 10 000) it raises :class:`ConvergenceError`, or returns what was reached
        where not ``strict``. ``generator``: of the first vector (torch's global one by default).
        """
        self.require_symmetric("lanczos")
        shaped = lambda vectors: FVector(vectors.view(-1, self.outputs, self.rows))
        product, start = self.flat_product(), self._start(self.shape[0], generator)
        try:
            with kept_passes():
                values, vectors = lanczos(product, start, k, which, tol, max_steps, strict=strict)
        except ConvergenceError as error:
            error.iterate = error.iterate[0], shaped(error.iterate[1])
            raise
        return values, shaped(vectors)

    def logdet(  # type: ignore[override]
        self,
        damping: float | Tensor = 0.0,
        estimator: str | None = None,
        steps: int = 64,
        samples: int = 32,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """``log det(K + damping I)`` as an :class:`Estimate`, by stochastic Lanczos quadrature.

        ``estimator``: ``"slq"``; without, it raises :class:`UnsupportedError`. ``steps`` products from each of
        ``samples`` random signs, drawn by ``generator`` (torch's global one by default). The standard error counts the
        draws, and what the second half of the steps changed. No gradient in ``damping``.
        """
        if estimator is None:
            raise self._refuse('exact logdet(); logdet(damping, estimator="slq") estimates it')
        self.require_symmetric("logdet")
        number = require_slq(estimator, damping)
        draws, product = self._draws(generator), self.flat_product()
        with kept_passes():
            return slq_logdet(product, self.shape[0], self._like, number, steps, samples=samples, generator=draws)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise UnsupportedError(
            "an implicit kernel follows its model; move the model with model.to(...) and build it again"
        )

    def eigh(self) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise self._refuse("eigh()")

    def _refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"an implicit kernel has no {what}; lanczos(k) gives leading eigenpairs, materialize() an FMatDense"
        )


def told_of(team: Team) -> str:
    """That products are made together, in a ``repr``."""
    return f", over {team.size} processes: products are collective" if team.size > 1 else ""
