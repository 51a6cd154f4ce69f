"""The matrix ``J^T J'`` over the parameters, known by the products of both maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import UnsupportedError
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.fmat.products import EVERYTHING, squared_norms
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.pmat.dense import PMatDense
from nngeom.pmat.drive import Repeated, built
from nngeom.pmat.expression import PMatExpression
from nngeom.pmat.operator import DENSE_LIMIT
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import Representation, as_representation
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.sweep import Chunk

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
        mine, theirs = (getattr(x, "tensor", getattr(x, "side", None)) for x in (self.left, self.right))
        return mine is theirs

    def product(self, x: Tensor) -> Tensor:
        return self.scale * self._unscaled(x)

    def _unscaled(self, x: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(PVector(self.layer_collection, x))).flat()

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        return [(self.scale, self._unscaled)]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return () if isinstance(self.right, PushForwardDense) else self.right.side.parameters

    @property
    def T(self) -> PMatPullPush:
        """The transpose, ``scale * J'^T J``."""
        return self if self.symmetric else replace(self, left=self.right.T, right=self.left.T)

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def trace(self) -> Tensor:
        if isinstance(self.right, PushForwardDense) and isinstance(self.left, PullBackDense):
            return self.scale * (self.left.tensor * self.right.tensor).sum()
        if not self.symmetric or isinstance(self.right, PushForwardDense):
            return self.to_dense().trace()
        with self.right.side.within():
            return self.scale * squared_norms(self.right.side, EVERYTHING)[""].sum()

    def to(self, *args: Any, **kwargs: Any) -> PMatPullPush:
        """Another dtype or device, as ``Tensor.to``; raises :class:`UnsupportedError` for implicit maps."""
        if isinstance(self.left, PullBackImplicit) or isinstance(self.right, PushForwardImplicit):
            raise UnsupportedError("implicit maps follow their model; move it with model.to(...) and build them again")
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
        if isinstance(self.right, PushForwardDense):
            matrix = built(chosen, self.layer_collection, ExplicitRows(self.right.tensor, self.layer_collection))
        else:
            with self.right.side.within():
                matrix = built(chosen, self.layer_collection, Repeated(self.right.side.sweep, chosen.passes))
        return matrix.examples * self.scale * matrix

    def __repr__(self) -> str:
        return f"PMatPullPush({self.scale:g} * {self.left!r} @ {self.right!r})"


class ExplicitRows:
    """Explicit rows ``[k, n, d]`` as a source of one chunk, one block a parameter."""

    def __init__(self, tensor: Tensor, collection: LayerCollection) -> None:
        jacobians: dict[Layout, LayerJacobian] = {}
        for name in collection.names:
            layout = collection.span([name])
            if layout.numel:
                jacobians[layout] = FullJacobian(layout.gather(tensor))
        self._chunk = Chunk(jacobians, tensor.shape[1], 0, (0, tensor.shape[0]))

    def chunks(self) -> Iterator[Chunk]:
        """The chunk."""
        return iter((self._chunk,))

    def raise_where_not_finite(self) -> None:
        """Rows at hand come from no batch."""


def product(pull_back: Pull, push_forward: Push) -> PMatPullPush:
    """``J^T J'`` of maps over the same parameters."""
    pull_back.layer_collection.require(push_forward.layer_collection, "the push-forward")
    return PMatPullPush(pull_back, push_forward)


JacobianMap.expressions.update(product=product)
