"""The matrix ``J^T J'`` over the parameters, known by the products of both maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.fmat.products import EVERYTHING, squared_norms
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.implicit import PullBackImplicit, PushForwardImplicit
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.pmat.dense import PMatDense
from nngeom.pmat.drive import Repeated, built
from nngeom.pmat.expression import PMatExpression
from nngeom.pmat.representation import as_representation
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.sweep import Chunk

Push = PushForwardDense | PushForwardImplicit
Pull = PullBackDense | PullBackImplicit


@dataclass(frozen=True, eq=False, repr=False)
class PMatPullPush(PMatExpression):
    """``scale * J^T J'``, not divided by the number of examples: lazy, by products of the maps."""

    left: Pull
    right: Push
    scale: float | Tensor = 1.0

    @property
    def layer_collection(self):
        return self.right.layer_collection

    @property
    def dtype(self):
        return self.right.dtype

    @property
    def device(self):
        return self.right.device

    @property
    def symmetric(self):
        mine, theirs = (getattr(x, "tensor", getattr(x, "side", None)) for x in (self.left, self.right))
        return mine is theirs

    def product(self, x):
        return self.scale * self._unscaled(x)

    def _unscaled(self, x: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(PVector(self.layer_collection, x))).flat()

    def terms(self):
        return [(self.scale, self._unscaled)]

    @property
    def held(self):
        return () if isinstance(self.right, PushForwardDense) else self.right.side.parameters

    def scaled(self, c):
        return replace(self, scale=c * self.scale)

    def trace(self):
        if isinstance(self.right, PushForwardDense) and isinstance(self.left, PullBackDense):
            return self.scale * (self.left.tensor * self.right.tensor).sum()
        if not self.symmetric or isinstance(self.right, PushForwardDense):
            return self.to_dense().trace()
        with self.right.side.within():
            return self.scale * squared_norms(self.right.side, EVERYTHING)[""].sum()

    def materialize(self, representation: Any = PMatDense, **options: Any) -> Any:
        """The same matrix in a representation (``PMatDense``, ``PMatDiag``, ``PMatLowRank``, ...)."""
        if not self.symmetric:
            return super().materialize()
        chosen = as_representation(representation, **options).within(self.layer_collection)
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

    def __init__(self, tensor: Tensor, collection: LayerCollection):
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
