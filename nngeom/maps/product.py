"""The matrix ``J^T J'`` over the parameters, known by the products of both maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import UnsupportedError
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.pmat.dense import PMatDense
from nngeom.pmat.drive import built
from nngeom.pmat.expression import PMatExpression
from nngeom.pmat.operator import DENSE_LIMIT
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import Representation, as_representation
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

Push = PushForwardDense | PushForwardImplicit
Pull = PullBackDense | PullBackImplicit
M = TypeVar("M", bound=PMat)


@dataclass(frozen=True, eq=False, repr=False)
class PMatPullPush(PMatExpression):
    """``scale * J^T J'``, not divided by the number of examples: lazy, by products of the maps."""

    left: Pull
    right: Push
    scale: float | Tensor = 1.0

    @property
    def layer_collection(self) -> LayerCollection:
        return self.right.layer_collection

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    @property
    def device(self) -> torch.device:
        return self.right.device

    @property
    def symmetric(self) -> bool:
        return self.left.origin is self.right.origin

    def product(self, x: Tensor) -> Tensor:
        return self.scale * self._unscaled(x)

    def _unscaled(self, x: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(PVector(self.layer_collection, x))).flat()

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        return [(self.scale, self._unscaled)]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.right.held

    @property
    def T(self) -> PMatPullPush:
        """The transpose, ``scale * J'^T J``."""
        return self if self.symmetric else replace(self, left=self.right.T, right=self.left.T)

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def trace(self) -> Tensor:
        return self.scale * self.left.dot(self.right)

    def to(self, *args: Any, **kwargs: Any) -> PMatPullPush:
        """Another dtype or device, as ``Tensor.to``; raises :class:`UnsupportedError` for implicit maps."""
        right = self.right.to(*args, **kwargs)
        return replace(self, left=right.T if self.symmetric else self.left.to(*args, **kwargs), right=right)

    def materialize(self, limit: Any = DENSE_LIMIT, **options: Any) -> Any:
        """The same matrix as a :class:`PMatDense`; raises :class:`SizeError` above ``limit`` parameters.

        A representation in place of ``limit``, with its ``options``, is that of :meth:`measured`.
        """
        if not isinstance(limit, int):
            return self.measured(limit, **options)
        if not self.symmetric:
            return super().materialize(limit)
        self._require_room(limit)
        return self.measured(PMatDense)

    def measured(self, representation: type[M] | Representation[M], **options: Any) -> M:
        """The same matrix in a ``representation`` (``PMatDense``, ``PMatDiag``, ``PMatLowRank``, ...) with its
        ``options``; raises :class:`UnsupportedError` where it is not symmetric.
        """
        if not self.symmetric:
            raise UnsupportedError("J^T J' of different maps is not symmetric; to_dense() gives the tensor")
        chosen: Representation[M] = as_representation(representation, **options).within(self.layer_collection)
        with self.right.within():
            matrix = built(chosen, self.layer_collection, self.right.source(chosen.passes))
        return matrix.examples * self.scale * matrix

    def __repr__(self) -> str:
        return f"PMatPullPush({self.scale:g} * {self.left!r} @ {self.right!r})"


def product(pull_back: Pull, push_forward: Push) -> PMatPullPush:
    """``J^T J'`` of maps over the same parameters."""
    pull_back.layer_collection.require(push_forward.layer_collection, "the push-forward")
    return PMatPullPush(pull_back, push_forward)


JacobianMap.expressions.update(product=product)
