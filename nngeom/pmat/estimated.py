"""Numbers of a matrix that is known by its products: exact where asked, else estimates with their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.pmat.arguments import is_spectral, require_frobenius
from nngeom.pmat.operator import ParameterOperator
from nngeom.solve.hutchinson import Estimate, hutchinson
from nngeom.solve.leave_one_out import DIAGONALS, TRACES, estimator_of
from nngeom.solve.norm import spectral_norm
from nngeom.solve.slq import require_slq, slq_logdet
from nngeom.space.pvector import PVector


class EstimatedOperator(ParameterOperator):
    """Trace, diagonal, norms, log-determinant and spectrum of a symmetric matrix, from its products with vectors."""

    def _estimate(
        self, estimator: Callable[..., Estimate], samples: int, generator: torch.Generator | None
    ) -> Estimate:
        return estimator(self.product, self.shape[0], samples, self._like, self._drawn(generator))

    def trace(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """``tr M``: exact by default, or an :class:`Estimate` with a standard error.

        ``estimator``: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"`` (Epperly, Tropp and Webber 2024; exact where the
        rank is below ``samples / 2``), of ``samples`` products with vectors by ``generator`` (torch's global one by
        default).
        """
        if estimator is None:
            return self._exact_trace()
        return self._estimate(estimator_of("trace", TRACES, estimator), samples, generator)

    def _exact_trace(self) -> Tensor:
        return self.to_dense().trace()

    def _exact_diagonal(self) -> Tensor:
        return self.to_dense().diagonal()

    def diag(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """The diagonal, a PVector: exact by default, or an :class:`Estimate` of two PVectors.

        ``estimator``: ``"hutchinson"`` or ``"xdiag"`` (Epperly, Tropp and Webber 2024), of ``samples`` products with
        random signs by ``generator`` (torch's global one by default).
        """
        if estimator is None:
            return PVector(self.layer_collection, self._exact_diagonal())
        found = self._estimate(estimator_of("diagonal", DIAGONALS, estimator), samples, generator)
        return Estimate(*(PVector(self.layer_collection, x) for x in (found.value, found.standard_error)))

    def norm(
        self, kind: str | int = "fro", samples: int | None = None, generator: torch.Generator | None = None
    ) -> Any:
        """The Frobenius norm (``kind="fro"``): exact on the dense matrix, or with ``samples`` an :class:`Estimate` from
        products; or the largest absolute eigenvalue (``kind=2``), by Lanczos.

        ``generator``: of the random vectors (torch's global one by default).
        """
        if is_spectral(kind):
            return spectral_norm(self.product, self._start(generator), self._like)
        require_frobenius(kind)
        if samples is None:
            return self.to_dense().norm()
        found = hutchinson(
            lambda z: self.product(self.product(z)), self.shape[0], samples, self._like, self._drawn(generator)
        )
        root = found.value.clamp_min(0).sqrt()
        return Estimate(root, found.standard_error / (2 * root))

    def logdet(  # type: ignore[override]
        self,
        damping: float | Tensor = 0.0,
        estimator: str | None = None,
        steps: int = 64,
        samples: int = 32,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """``log det(M + damping I)`` as an :class:`Estimate`, by stochastic Lanczos quadrature.

        ``estimator``: ``"slq"``; without, it raises :class:`UnsupportedError`: products give no exact one. ``steps``
        products from each of ``samples`` random signs, drawn by ``generator`` (torch's global one by default). The
        standard error counts the draws, and what the second half of the steps changed. No gradient in ``damping``.
        """
        if estimator is None:
            raise self.refusal('exact logdet(); logdet(damping, estimator="slq") estimates it')
        number = require_slq(estimator, damping)
        drawn = self._drawn(generator)
        return slq_logdet(self.product, self.shape[0], self._like, number, steps, samples=samples, generator=drawn)

    def refusal(self, what: str) -> UnsupportedError:
        """The error that ``what`` is not offered."""
        return UnsupportedError(
            f"an implicit matrix has no {what}; lanczos(k) and spectral_density() estimate its spectrum, or "
            "build a PMatDense, PMatKFAC or PMatEKFAC"
        )

    def eigh(self) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise self.refusal("eigh()")
