"""The rows of a Jacobian at hand, as what a matrix is built from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Chunk


class ExplicitRows:
    """Explicit rows ``[k, n, d]`` as a source of one chunk, one block a parameter."""

    run = None

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

    def restart(self) -> None:
        """The rows stay."""

    def raise_where_not_finite(self) -> None:
        """Rows at hand come from no batch."""
