"""Spectra from products with vectors: eigenvalues at the ends by Lanczos' method, the distribution of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core.errors import ConvergenceError, UnsupportedError
from nngeom.solve.lanczos import lanczos
from nngeom.solve.slq import SpectralDensity, spectral_density
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


class Spectra:
    """What products of a symmetric matrix tell of its spectrum; joins
    :class:`nngeom.pmat.operator.ParameterOperator`.
    """

    if TYPE_CHECKING:  # of ParameterOperator

        @property
        def layer_collection(self) -> LayerCollection: ...
        @property
        def shape(self) -> tuple[int, int]: ...
        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def device(self) -> torch.device: ...
        def product(self, x: Tensor) -> Tensor: ...

    def _drawn(self, generator: torch.Generator | None) -> torch.Generator | None:
        """What random vectors are drawn by."""
        return generator

    @property
    def _like(self) -> Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device)

    def _start(self, generator: torch.Generator | None) -> Tensor:
        generator = self._drawn(generator)
        device = self.device if generator is None else generator.device
        return torch.randn(self.shape[0], generator=generator, dtype=self.dtype, device=device).to(self.device)

    def lanczos(
        self,
        k: int,
        which: str = "largest",
        *,
        tol: float = 1e-6,
        max_steps: int | None = None,
        strict: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PVector]:
        """``k`` eigenvalues at an end of the spectrum ``(k,)``, and their vectors, a batch of PVectors.

        ``which``: ``"largest"``, descending, ``"smallest"``, ascending, or ``"both"``, half from each end, descending.
        It goes on until residuals are below ``tol`` times the largest absolute eigenvalue; after ``max_steps`` products
        (by default ten times the side, at most 10 000) it raises :class:`ConvergenceError`, or returns what was reached
        where not ``strict``. ``generator``: of the first vector (torch's global one by default).
        """
        self._require_symmetric()
        try:
            values, vectors = lanczos(self.product, self._start(generator), k, which, tol, max_steps, strict=strict)
        except ConvergenceError as error:
            error.iterate = error.iterate[0], PVector(self.layer_collection, error.iterate[1])
            raise
        return values, PVector(self.layer_collection, vectors)

    def spectral_density(
        self, steps: int = 64, samples: int = 8, generator: torch.Generator | None = None
    ) -> SpectralDensity:
        """The distribution of eigenvalues by stochastic Lanczos quadrature: ``steps`` products from each of ``samples``
        random vectors, drawn by ``generator`` (torch's global one by default).
        """
        self._require_symmetric()
        drawn = self._drawn(generator)
        return spectral_density(self.product, self.shape[0], self._like, steps, samples, drawn)

    def _require_symmetric(self) -> None:
        if not getattr(self, "symmetric", True):
            raise UnsupportedError(
                "a product of matrices, and a sum with one, is not symmetric; use torch.linalg.eig(M.to_dense())"
            )
