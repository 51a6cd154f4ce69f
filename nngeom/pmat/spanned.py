"""Any spectrum on few orthonormal vectors, and one value on all that is orthogonal to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.pmat.block import Block
from nngeom.pmat.block_algebra import Remake, largest, same
from nngeom.pmat.eigenvalues import reciprocal
from nngeom.pmat.householder import HouseholderBasis


@dataclass(frozen=True, eq=False)
class SpannedBlock(Block):
    """``V^T diag(values) V + rest (I - V^T V)`` with orthonormal rows ``v``, over the flattened block ``[1, 1, p]``."""

    v: Tensor  # [r p]
    values: Tensor  # [r]
    rest: Tensor  # []

    def mv(self, x: Tensor) -> Tensor:
        return self.rest * x + ((x @ self.v.T) * (self.values - self.rest)) @ self.v

    def diag(self) -> Tensor:
        return (self.rest + (self.values - self.rest) @ self.v.square())[None, None]

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((1, 1, self.v.shape[1]))

    def trace(self) -> Tensor:
        return self.values.sum() + self.rest * (self.v.shape[1] - len(self.values))

    def squared_norm(self) -> Tensor:
        return self.values.square().sum() + self.rest.square() * (self.v.shape[1] - len(self.values))

    def scaled(self, c: float | Tensor) -> SpannedBlock:
        return SpannedBlock(self.v, c * self.values, c * self.rest)

    def inverse(self, damping: Damping) -> SpannedBlock:
        held = torch.cat([self.values, self.rest.view(1)]) if self._others else self.values
        inverse = reciprocal(held, damping, "the low-rank matrix")
        return SpannedBlock(self.v, inverse[: len(self.values)], inverse[-1] if self._others else self.rest)

    def eigh(self) -> tuple[Tensor, HouseholderBasis]:
        return self._all(), HouseholderBasis.of(self.v)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self._all(), self._remade

    def spectral_norm(self) -> Tensor:
        return largest(self._all())

    @property
    def _others(self) -> int:
        """How many dimensions are orthogonal to the vectors."""
        return self.v.shape[1] - len(self.values)

    def _all(self) -> Tensor:
        return torch.cat([self.values, self.rest.expand(self._others)])[None, None]

    def _remade(self, f: Tensor) -> Block:
        few, others = f.flatten()[: len(self.values)], f.flatten()[len(self.values) :]
        rest = same(others, "a low-rank matrix") if len(others) else torch.zeros_like(self.rest)
        return SpannedBlock(self.v, few, rest)
