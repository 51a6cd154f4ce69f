"""The diagonal, and for every output unit the covariances of its bias with its incoming weights (Ollivier 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.jacobian import LayerJacobian, pieces
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block, BlockBasis
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import log_sum, reciprocal
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True, eq=False)
class ArrowBlock(Block):
    """An arrow matrix a unit: diagonal ``d``, and ``c`` between the last coordinate and each of the others."""

    d: Tensor  # [s o i]
    c: Tensor  # [s o i-1]

    def mv(self, x: Tensor) -> Tensor:
        w, b = x[..., :-1], x[..., -1:]
        return self.d * x + torch.cat([self.c * b, (self.c * w).sum(-1, keepdim=True)], -1)

    def diag(self) -> Tensor:
        return self.d

    def squared_norm(self) -> Tensor:
        return self.d.square().sum() + 2 * self.c.square().sum()

    def scaled(self, c: float | Tensor) -> ArrowBlock:
        return ArrowBlock(c * self.d, c * self.c)

    def added(self, other: Block) -> ArrowBlock | None:
        return ArrowBlock(self.d + other.d, self.c + other.c) if isinstance(other, ArrowBlock) else None

    def inverse(self, damping: Damping) -> UnitBlock | SpikeBlock:
        if isinstance(damping, Cutoff):
            values, basis = self.eigh()
            return UnitBlock((basis.u * reciprocal(values, damping, "the arrow matrix").unsqueeze(-2)) @ basis.u.mT)
        if isinstance(damping, Tikhonov) and damping.indefinite:
            return UnitBlock(self.units()).inverse(damping)
        return self._spike(damping)

    def _spike(self, damping: Tikhonov | FactoredTikhonov) -> SpikeBlock:
        """The inverse by the Schur complement of the last coordinate; the arrow need not be positive, and says what it
        needs.
        """
        d = self.d + damping.value
        w, b = d[..., :-1], d[..., -1]
        positive = bool((w > 0).all())
        schur = b - (self.c.square() / w).sum(-1) if positive else b
        if not positive or bool((schur <= 4 * torch.finfo(d.dtype).eps * d.abs().amax(-1)).any()):
            least = self.eigh()[0].min().item()
            raise SingularError(
                f"the quasi-diagonal matrix is not positive definite with damping {damping.value:g}: its "
                "smallest eigenvalue is "
                f"{least:.3e}; use a damping above {max(-least, 0.0):.3e} (quasi-diagonal matrices need not be "
                "positive semi-definite)",
                max(-least, 0.0),
            )
        ratio = torch.cat([self.c / w, -torch.ones_like(b).unsqueeze(-1)], -1)
        return SpikeBlock(torch.cat([1 / w, torch.zeros_like(b).unsqueeze(-1)], -1), ratio / schur.sqrt().unsqueeze(-1))

    def eigh(self) -> tuple[Tensor, UnitBasis]:
        values, u = linalg.eigh(self.units())
        return values, UnitBasis(u)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return UnitBlock(self.units()).spectrum()

    def restricted(self, columns: list[int]) -> DiagBlock:
        return DiagBlock(self.d[..., columns])  # without the bias, or without all that only it is coupled with

    def logdet(self, damping: Tikhonov) -> Tensor:
        """By the Schur complements; without damping ``-inf`` exactly where :meth:`inverse` raises."""
        try:
            inverse = self._spike(damping)
        except SingularError:
            return super().logdet(damping) if damping.value > 0 else log_sum(self.d.new_zeros(1) + damping.value)
        w = (self.d[..., :-1] + damping.value).log().sum()
        return w - 2 * inverse.u[..., -1].abs().log().sum()

    def units(self) -> Tensor:
        """``[s, o, i, i]``: the entries, unit by unit."""
        m = torch.diag_embed(self.d)
        m[..., :-1, -1] = self.c
        m[..., -1, :-1] = self.c
        return m


@dataclass(frozen=True, eq=False)
class SpikeBlock(Block):
    """A diagonal plus a rank-one matrix a unit, ``diag(d) + u u^T``: the inverse of an arrow."""

    d: Tensor  # [s o i]
    u: Tensor  # [s o i]

    def mv(self, x: Tensor) -> Tensor:
        return self.d * x + self.u * (self.u * x).sum(-1, keepdim=True)

    def diag(self) -> Tensor:
        return self.d + self.u.square()

    def squared_norm(self) -> Tensor:
        cross = (self.d * self.u.square()).sum()
        return self.d.square().sum() + 2 * cross + self.u.square().sum(-1).square().sum()

    def scaled(self, c: float | Tensor) -> Block:
        return SpikeBlock(c * self.d, c**0.5 * self.u) if c > 0 else UnitBlock(c * self.units())

    def inverse(self, damping: Damping) -> Block:
        return UnitBlock(self.units()).inverse(damping)

    def eigh(self) -> tuple[Tensor, BlockBasis]:
        return UnitBlock(self.units()).eigh()

    def spectrum(self) -> tuple[Tensor, Remake]:
        return UnitBlock(self.units()).spectrum()

    def restricted(self, columns: list[int]) -> SpikeBlock:
        return SpikeBlock(self.d[..., columns], self.u[..., columns])

    def units(self) -> Tensor:
        """``[s, o, i, i]``: the entries, unit by unit."""
        return torch.diag_embed(self.d) + self.u.unsqueeze(-1) * self.u.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class UnitBlock(Block):
    """A dense symmetric matrix a unit, ``m [s, o, i, i]``, over its incoming weights and bias."""

    m: Tensor  # [s o i i]

    def mv(self, x: Tensor) -> Tensor:
        return (self.m @ x.unsqueeze(-1)).squeeze(-1)

    def diag(self) -> Tensor:
        return self.m.diagonal(dim1=-2, dim2=-1)

    def squared_norm(self) -> Tensor:
        return self.m.square().sum()

    def scaled(self, c: float | Tensor) -> UnitBlock:
        return UnitBlock(c * self.m)

    def added(self, other: Block) -> UnitBlock | None:
        return UnitBlock(self.m + other.m) if isinstance(other, UnitBlock) else None

    def inverse(self, damping: Damping) -> UnitBlock:
        values, basis = self.eigh()
        inverse = reciprocal(values, damping, "the unit-wise matrix")
        if self.m.requires_grad and not isinstance(damping, Cutoff):  # equal eigenvalues: no gradient of eigenvectors
            eye = torch.eye(self.m.shape[-1], dtype=self.m.dtype, device=self.m.device)
            return UnitBlock(torch.linalg.inv(self.m + damping.value * eye))
        return UnitBlock((basis.u * inverse.unsqueeze(-2)) @ basis.u.mT)

    def eigh(self) -> tuple[Tensor, UnitBasis]:
        values, u = linalg.eigh(self.m)
        return values, UnitBasis(u)

    def spectrum(self) -> tuple[Tensor, Remake]:
        values, basis = self.eigh()
        return values, lambda f: UnitBlock((basis.u * f.unsqueeze(-2)) @ basis.u.mT)

    def restricted(self, columns: list[int]) -> UnitBlock:
        return UnitBlock(self.m[..., columns, :][..., columns])


@dataclass(frozen=True, eq=False)
class UnitBasis(BlockBasis):
    """Eigenvectors of every unit, the columns of ``u``."""

    u: Tensor  # [s o i i]

    def mv(self, x: Tensor) -> Tensor:
        return (self.u @ x.unsqueeze(-1)).squeeze(-1)

    def tmv(self, x: Tensor) -> Tensor:
        return (self.u.mT @ x.unsqueeze(-1)).squeeze(-1)


class PMatQuasiDiag(PMat):
    """The diagonal, and each output unit's weights against its bias. Units without bias keep their diagonal."""

    projects = True
    layerwise = True
    blocks_in_layers = True

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        def statistic(chunk: Chunk) -> Named:
            named = {}
            for layout, j in chunk.jacobians.items():
                named[layout] = {"d": j.square()}
                if len(layout.pieces) == 2:  # weight and bias
                    named[layout]["c"] = _coupling(j)
            return named

        means = yield statistic
        return {layout: ArrowBlock(t["d"], t["c"]) if "c" in t else DiagBlock(t["d"]) for layout, t in means.items()}

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        s, o, i = layout.sizes
        return 1 if rows is None else layout.numel + (s * o * (i - 1) if len(layout.pieces) == 2 else 0)


def _coupling(j: LayerJacobian) -> Tensor:
    """``sum_kn J[..., :-1] J[..., -1:]``, ``[s, o, i-1]``."""
    _, _, s, o, i = j.shape
    total = torch.zeros(s, o, i - 1, dtype=linalg.accumulation_dtype(j.dtype), device=j.device)
    for part in pieces(j, memory.CACHE_BYTES):
        m = part.matrix()
        total += (m[..., :-1] * m[..., -1:]).sum((0, 1))
    return total
