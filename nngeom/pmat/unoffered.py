"""What only some matrices have: parts, functions of their eigenvalues. Others say what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeom.core.errors import UnsupportedError

if TYPE_CHECKING:
    from nngeom.pmat.operator import ParameterOperator


class Unoffered:
    """Refusals, each with a remedy; joins :class:`nngeom.pmat.operator.ParameterOperator`."""

    def __getitem__(self, pattern: Any) -> ParameterOperator:
        """The principal submatrix over the parameters of ``pattern``; raises :class:`UnsupportedError` where that is
        not there.
        """
        raise self._without_parts()

    def by_layer(self) -> Mapping[str, Any]:
        """The diagonal block of every layer; raises :class:`UnsupportedError` where they are not there."""
        raise self._without_parts()

    def apply(self, f: Callable[[Tensor], Tensor]) -> ParameterOperator:
        """``f(M)``, ``f`` of the eigenvalues; raises :class:`UnsupportedError` where they are not there."""
        raise self._without_eigenbasis()

    def power(self, p: float, damping: Any = 0.0) -> ParameterOperator:
        """``(M + damping I)^p``; raises :class:`UnsupportedError` where no eigenbasis is there."""
        raise self._without_eigenbasis()

    def __pow__(self, p: float) -> ParameterOperator:
        return self.power(p)

    def _without_parts(self) -> UnsupportedError:
        return UnsupportedError(
            f"a {type(self).__name__} has no parts of its kind; use those of the matrices that it is made of, or "
            "materialize()[pattern] where it is symmetric and small"
        )

    def _without_eigenbasis(self) -> UnsupportedError:
        return UnsupportedError(
            f"a {type(self).__name__} has no eigenbasis for functions and powers; use materialize() of a sum, a stored "
            "representation of an implicit matrix (PMatEKFAC, PMatLowRank, PMatDense), or M.solve(b, damping)"
        )
