"""Parts of a sum over some of the parameters, and functions of it, as its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping
from nngeom.pmat.damped import require_added
from nngeom.pmat.expression import PMatExpression
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.partitioned import Partitioned
from nngeom.pmat.sum_block import BLOCK_LIMIT


class SumParts(PMatExpression):
    """Joins :class:`nngeom.pmat.sums.PMatSum`."""

    parts: tuple[ParameterOperator, ...]
    weights: tuple[float | Tensor, ...] | None

    if TYPE_CHECKING:  # of PMatSum

        def __init__(self, parts: Any, weights: Any = None) -> None: ...

        def partitioned(
            self, limit: int = ..., tol: float | None = ..., max_steps: int | None = ..., *, wide: bool = ...
        ) -> Partitioned | None: ...

        def with_damping(self, damping: Any, limit: int, *, indefinite: bool = False) -> tuple[SumParts, Damping]: ...

    def __getitem__(self, pattern: Any) -> Self:
        """The principal submatrix over a layer, or the parameters that another ``pattern`` means: the sum of those of
        the parts.
        """
        names = list(self.layer_collection.part(pattern).names)
        return type(self)(tuple(p[names] for p in self.parts), self.weights)

    def by_layer(self) -> dict[str, Self]:
        """``{layer: its diagonal block}``, each the sum of those of the parts."""
        tables = [p.by_layer() for p in self.parts]
        return {layer: type(self)(tuple(t[layer] for t in tables), self.weights) for layer in tables[0]}

    def apply(self, f: Callable[[Tensor], Tensor], limit: int = BLOCK_LIMIT) -> ParameterOperator:
        """``f(M)``, ``f`` of all eigenvalues ``(d,)``, ascending, as for a stored matrix; ``limit`` as for
        :meth:`inverse`. Raises :class:`UnsupportedError` with implicit parts.
        """
        blocks = self.partitioned(limit, wide=True)
        return super().apply(f) if blocks is None else blocks.whole().matrix.apply(f).to(self.dtype)

    def power(self, p: float, damping: Any = 0.0, limit: int = BLOCK_LIMIT) -> ParameterOperator:
        """``(M + damping I)^p`` for a real ``p``; ``damping``: what :meth:`solve` adds to the diagonal; ``limit`` as
        for :meth:`inverse`. Raises as :meth:`apply`, and as the power of a stored matrix.
        """
        m, d = self.with_damping(damping, limit)
        blocks = m.partitioned(limit, wide=True)
        if blocks is None:
            return super().power(p)
        return blocks.whole().matrix.power(p, require_added(d, "a power")).to(self.dtype)
