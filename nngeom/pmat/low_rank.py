"""Rows whose Gram matrix is the matrix: ``R^T R`` with as many rows as examples times cotangents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import linalg
from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov, Tikhonov
from nngeom.core.errors import SingularError, UnsupportedError
from nngeom.core.linear import differentiated
from nngeom.core.statistic import Named, Stacked
from nngeom.pmat.block import Block
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.eigenvalues import log_sum, reciprocal, shifted_logdet
from nngeom.pmat.given import require_count, require_entries
from nngeom.pmat.householder import HouseholderBasis
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, join_rows
from nngeom.pmat.spanned import SpannedBlock
from nngeom.solve.corrected import corrected
from nngeom.space.collection import LayerCollection
from nngeom.space.joined import require_collection
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True, eq=False)
class LowRankBlock(Block):
    """``sign * R^T R + shift * I`` over the flattened block ``[1, 1, p]``."""

    r: Tensor  # [m p]
    sign: float = 1.0
    shift: float | Tensor = 0.0  # a tensor where it has a graph

    def mv(self, x: Tensor) -> Tensor:
        low = self.sign * (x @ self.r.T) @ self.r
        return low + self.shift * x if self.is_shifted else low

    def diag(self) -> Tensor:
        return (self.sign * self.r.square().sum(0) + self.shift)[None, None]

    def trace(self) -> Tensor:
        return self.sign * self.r.square().sum() + self.shift * self.r.shape[1]

    def squared_norm(self) -> Tensor:
        gram = self.r @ self.r.T if self.r.shape[0] <= self.r.shape[1] else self.r.T @ self.r
        return (
            gram.square().sum() + 2 * self.sign * self.shift * self.r.square().sum() + self.shift**2 * self.r.shape[1]
        )

    @property
    def is_shifted(self) -> bool:
        """Whether there is a shift, or one that is zero but has a graph."""
        return isinstance(self.shift, Tensor) or self.shift != 0

    def scaled(self, c: float | Tensor) -> Block:
        rooted = not (differentiated(c) and float(c.detach()) == 0)  # type: ignore[union-attr]
        return self.by_rows(c) if rooted else self._spanned().scaled(c)

    def by_rows(self, c: float | Tensor) -> LowRankBlock:
        """``c M`` as rows; raises :class:`UnsupportedError` for a derivative in a ``c`` of zero: its root has none."""
        factor = c if differentiated(c) else float(c)
        if isinstance(factor, Tensor) and float(factor.detach()) == 0:
            raise UnsupportedError(
                "the derivative of a sum with a low-rank matrix, in a factor of zero, is not offered; use a small "
                "factor, or another representation"
            )
        size: Any = abs(factor)
        return LowRankBlock(self.r * size**0.5, self.sign if factor >= 0 else -self.sign, self.shift * factor)

    def added(self, other: Block) -> Block | None:
        if isinstance(other, LowRankBlock) and self.sign == other.sign:
            return LowRankBlock(torch.cat([self.r, other.r]), self.sign, self.shift + other.shift)
        return None

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        """Woodbury with the Gram matrix of the rows, ``(b - R^T (R R^T +- c I)^-1 R b) / c``, :func:`corrected`, in
        float64 where float32 is too coarse, else :meth:`inverse`.
        """
        c = self.shift + damping.value
        if isinstance(damping, Cutoff) or c <= 0:
            return super().solve(b, damping)
        x = self._woodbury(b.flatten(0, -2), c)
        if x is not None:
            return x.view(b.shape)
        if b.dtype is torch.float32 and b.device.type != "mps":
            return self.to(torch.float64).solve(b.double(), damping).to(b.dtype)
        return super().solve(b, damping)

    def _woodbury(self, b: Tensor, c: Any) -> Tensor | None:
        """``None`` where rounding leaves too little of it."""
        gram = self.sign * (self.r @ self.r.T)
        gram.diagonal().add_(c)
        try:
            factor = linalg.cholesky(gram, "the low-rank matrix")
        except SingularError:
            return None

        def inverse(y: Tensor) -> Tensor:
            x: Tensor = (y - self.sign * torch.cholesky_solve((y @ self.r.T).T, factor).T @ self.r) / c
            return x

        return corrected(lambda y: self.sign * (y @ self.r.T) @ self.r + c * y, inverse, b)

    def inverse(self, damping: Damping) -> Block:
        """Woodbury; with ``R = U S V^T`` the inverse is ``V (1 / (S^2 + c) - 1 / c) V^T + I / c``, low-rank again."""
        values, v = self._spectrum()
        if isinstance(damping, Cutoff):
            inverse = reciprocal(values + self.shift, damping, "the low-rank matrix")
            if self.shift > damping.value:
                return self._signed(inverse - 1 / self.shift, v, 1 / self.shift)
            return self._signed(inverse, v, 0.0)
        if isinstance(damping, Tikhonov) and damping.indefinite:
            return self._spanned().inverse(damping)
        c = self._positive_shift(damping) if v.shape[0] < self.r.shape[1] else self.shift + damping.value
        inverse = reciprocal(values + self.shift, damping, "the low-rank matrix")
        rest = 1 / c if c > 0 else 0.0
        return self._signed(inverse - rest, v, rest)

    def eigh(self) -> tuple[Tensor, HouseholderBasis]:
        values, v = self._spectrum()
        d = self.r.shape[1]
        full = torch.cat([values, values.new_zeros(d - len(values))]) + self.shift
        return full[None, None], HouseholderBasis.of(v)

    def logdet(self, damping: Tikhonov) -> Tensor:
        values, v = self._spectrum()
        rest = self.r.shape[1] - v.shape[0]
        others = values.new_zeros(min(rest, 1)) + self.shift  # of the shift, once
        whole = torch.cat([values + self.shift, others])
        low, many = shifted_logdet(whole, damping), rest - 1
        return low + many * log_sum(others + damping.value) if many > 0 else low

    def _positive_shift(self, damping: Tikhonov | FactoredTikhonov) -> float | Tensor:
        c = self.shift + damping.value
        if c <= 0:
            raise SingularError(
                f"a low-rank matrix of rank at most {self.r.shape[0]} over {self.r.shape[1]} parameters is "
                "singular; use a damping above 0"
            )
        return c

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Non-zero eigenvalues of ``sign R^T R`` and their orthonormal vectors ``[r, p]``."""
        s, v = linalg.svd(self.r)
        keep = s > s.amax() * max(self.r.shape) * torch.finfo(self.r.dtype).eps if s.numel() else s > 0
        return self.sign * s[keep].square().to(self.r), v[keep].to(self.r)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self._spanned().spectrum()

    def _spanned(self) -> SpannedBlock:
        values, v = self._spectrum()
        return SpannedBlock(v, values + self.shift, values.new_zeros(()) + self.shift)

    def restricted(self, columns: list[int]) -> LowRankBlock:
        return replace(self, r=self.r[:, columns])

    def _signed(self, values: Tensor, v: Tensor, shift: float | Tensor) -> Block:
        """``V^T diag(values) V + shift I``, low-rank again where the values have one sign."""
        sign = -1.0 if bool((values <= 0).all()) else 1.0
        if bool((values * sign < 0).any()):
            return SpannedBlock(v, values + shift, values.new_zeros(()) + shift)
        some = values * sign > 0  # the root of zero has no derivative
        root = torch.where(some, (values * sign).where(some, torch.ones_like(values)).sqrt(), torch.zeros_like(values))
        return LowRankBlock(root.unsqueeze(1) * v, sign, shift)


class PMatLowRank(PMat, made_of=SpannedBlock):
    """``R^T R`` with ``R`` the rows ``v J / sqrt(n)``: exact, and lean while examples times outputs are fewer than
    parameters.
    """

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        layout = selection.span()

        def statistic(chunk: Chunk) -> Named:
            return {
                layout: {
                    "r": Stacked(
                        [rows.transpose(0, 1).flatten(0, 1) for rows in join_rows(chunk, layout, layout.names)]
                    )
                }
            }

        means = yield statistic
        return {lay: LowRankBlock(t["r"]) for lay, t in means.items()}

    @classmethod
    def from_rows(cls, lc: LayerCollection, rows: Tensor, examples: int = 1) -> Self:
        """``R^T R`` of the ``rows (r, d)``, in the flat order of ``lc``, not divided by anything; a copy.

        ``examples``: how many it is a mean over, for :func:`nngeom.merge`. Raises :class:`ArgumentError` for another
        shape, :class:`NonFiniteError` for NaN and infinity.
        """
        r = require_entries(rows, "the tensor of rows", None, require_collection(lc).numel)
        return cls.of_blocks(lc, {lc.span(): LowRankBlock(r)}, require_count(examples))
