"""A matrix from random probes of the outputs, with standard errors of what is read off it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.pmat.operator import ParameterOperator
from nngeom.solve.hutchinson import Estimate
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False, repr=False)
class MatrixEstimate:
    """``matrix``, the mean over all probes, and ``draws``, the same representation from each probe alone.

    Standard errors are those of the mean over the draws, independent of each other; infinite for a single one. They say
    how far the reading is from that of the same representation with all outputs, not what the representation drops.
    """

    matrix: ParameterOperator
    draws: tuple[ParameterOperator, ...]

    def reading(self, f: Callable[[Any], Any]) -> Estimate:
        """``f(matrix)`` with its standard error, for any ``f`` linear in the matrix that returns a tensor or
        PVector.
        """
        value = f(self.matrix)
        if isinstance(value, PVector):
            error = self._error(torch.stack([f(m).flat() for m in self.draws]))
            return Estimate(value, PVector(value.layer_collection, error))
        return Estimate(value, self._error(torch.stack([f(m) for m in self.draws])))

    def trace(self) -> Estimate:
        """``tr M`` with its standard error."""
        return self.reading(lambda m: m.trace())

    def diag(self) -> Estimate:
        """The diagonal with its standard errors, two PVectors."""
        return self.reading(lambda m: m.diag())

    def vTMv(self, v: PVector) -> Estimate:
        """``v^T M v`` with its standard error, batched."""
        return self.reading(lambda m: m.vTMv(v))

    def mv(self, v: PVector) -> Estimate:
        """``M v`` with its standard errors, two PVectors, batched."""
        return self.reading(lambda m: m.mv(v))

    def __repr__(self) -> str:
        return f"MatrixEstimate({self.matrix!r}, probes={len(self.draws)})"

    def _error(self, x: Tensor) -> Tensor:
        return x.std(0) / len(x) ** 0.5 if len(x) > 1 else torch.full_like(x[0], torch.inf)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(
            f"a matrix estimated from random probes has no {name} with a standard error; .matrix.{name} has it "
            "without one"
        )
