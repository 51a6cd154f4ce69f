"""Sums of Jacobians, lazy where one of them is known by its products only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentTypeError
from nngeom.fmat.columns import Act
from nngeom.maps.dense import DenseMap
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True, eq=False, repr=False)
class MapSum(JacobianMap):
    """``sum_j weight_j J_j`` of maps of one shape."""

    parts: tuple[JacobianMap, ...]
    weights: tuple[float | Tensor, ...]

    @property
    def pushes(self) -> bool:  # type: ignore[override]
        return self.parts[0].pushes

    @property
    def layer_collection(self) -> LayerCollection:
        return self.parts[0].layer_collection

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def summands(self) -> list[tuple[float | Tensor, JacobianMap]]:
        return list(zip(self.weights, self.parts))

    def mv(self, v: Any) -> Any:
        first, *rest = (part.mv(v) * w for w, part in self.summands())
        return sum(rest, first)

    @property
    def T(self) -> MapSum:
        """The transpose."""
        return MapSum(tuple(part.T for part in self.parts), self.weights)  # type: ignore[attr-defined]

    def materialize(self) -> DenseMap:
        """The same map with all its entries."""
        dense = [part.materialize() for part in self.parts]
        first, *rest = (part * w for w, part in zip(self.weights, dense))
        return sum(rest, first)

    def to(self, *args: Any, **kwargs: Any) -> MapSum:
        """Another dtype or device, as ``Tensor.to``; raises :class:`UnsupportedError` for implicit maps."""
        return MapSum(tuple(part.to(*args, **kwargs) for part in self.parts), self.weights)

    def norm(self) -> Tensor:
        return self.materialize().norm()

    def __getitem__(self, name: str) -> Tensor:
        first, *rest = (w * part[name] for w, part in self.summands())
        return sum(rest, first)

    def lazily(self, act: Act, transposed: Act, examples: int) -> Any:
        """A linear map ``act`` of function space, with its transpose ``transposed``, on all columns: functions on so
        many ``examples``, lazy.
        """
        if not self.pushes:
            raise ArgumentTypeError("the operand is a pull-back; expected a push-forward, which is its transpose .T")
        return self.expressions["mapped"](self, act, transposed, examples)

    def forms(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """A quadratic form ``f``, ``[r, d] -> [r]``, of all rows, ``(c, n)``."""
        if not self.pushes:
            raise ArgumentTypeError("the operand is a pull-back; expected a push-forward, which is its transpose .T")
        return self.materialize().forms(f)  # type: ignore[attr-defined]


def total(terms: Sequence[tuple[float | Tensor, Any]]) -> MapSum:
    """The sum of maps with factors."""
    weights, parts = zip(*terms)
    return MapSum(parts, weights)


JacobianMap.expressions.update(sum=total)
