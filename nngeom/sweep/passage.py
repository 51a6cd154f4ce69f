"""One call of a model in training: its uses, and their rows of the user's loss or of a metric.

Nothing here holds the graph of the call, so that one that is never backpropagated goes away with its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from nngeom.capture.network import Network
from nngeom.core import memory
from nngeom.core.errors import OutputError
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import flat_rows
from nngeom.core.stream import Stream
from nngeom.core.widened import widened
from nngeom.pullback.backward import pull_back
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.sizes import bytes_each_cotangent
from nngeom.space.collection import LayerCollection
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.sweep import Chunk


class Passage:
    """The uses of one call, and the gradients of their outputs as the user's backward pass brings them.

    ``arrives`` is asked at every gradient whether it counts.
    """

    def __init__(self, network: Network, run: Pass, arrives: Callable[[], Any]):
        self.collection, self.rest, self.n, self.arrives = network.collection, run.rest, run.n, arrives
        self.groups = [group.off_the_graph() for group in run.groups]
        self.shapes = [use.shape for use in run.capture.uses]
        self.zero = run.capture.outputs.detach().new_zeros(1)
        self.forget()
        self.handles = [
            use.edge.node.register_prehook(_reader(ref(self), j, use.edge.output_nr))
            for j, use in enumerate(run.capture.uses)
        ]

    def forget(self) -> None:
        """Drop the gradients that have arrived."""
        self.gradients: list[Tensor | None] = [None] * len(self.shapes)

    def take(self, j: int, gradient: Tensor | None) -> None:
        """A ``gradient`` of the output of use ``j``; those of several backward passes add up."""
        if gradient is not None and self.arrives():
            before, new = self.gradients[j], gradient.detach()
            self.gradients[j] = new if before is None else before + new

    @torch.no_grad()
    def chunk(self, start: int, rest: Mapping[str, Tensor]) -> Chunk:
        """The rows of the user's own loss; ``rest``: gradients of the parameters that have one row a batch."""
        gradients = [
            self.zero.expand(1, *shape) if g is None else g.unsqueeze(0)
            for g, shape in zip(self.gradients, self.shapes)
        ]
        jacobians = {group.layout: group.jacobian(gradients, self.n) for group in self.groups}
        rows = {name: rest[name].reshape(1, -1) for name in self.rest if name in rest}
        return Chunk(jacobians | batchwise(self.collection, rows), self.n, start, (0, 1))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _reader(passage: ref[Passage], j: int, output: int) -> Callable[[Any], None]:
    def read(grads: Any) -> None:
        mine = passage()
        if mine is None:
            raise OutputError(
                "the backward pass reached the parameters of the model, but not by the outputs that are followed, "
                "which are gone: pass outputs=lambda returned: ... that picks those of the loss"
            )
        mine.take(j, grads[output])

    return read


def measured(network: Network, run: Pass, cotangents: Cotangents, start: int) -> Iterator[Chunk]:
    """The rows of the cotangents of a metric, pulled back through the user's graph, which is kept.

    ``start``: the running index of the first example, which draws are keyed by.
    """
    outputs, examples = run.capture.outputs, torch.arange(start, start + run.n)
    columns = cotangents.columns(outputs.detach(), None, start)
    edges, shapes = [u.edge for u in run.capture.uses], [u.shape for u in run.capture.uses]
    parameters = [run.capture.leaves.tensors[name] for name in run.rest]
    size = memory.step(columns.count, bytes_each_cotangent(run.capture, keep_graph=False), "output of one batch")
    for lo in range(0, columns.count, size):
        v = columns.make(lo, min(columns.count, lo + size)).to(outputs.dtype)
        gradients = pull_back(outputs, edges, shapes, v, retain=True)
        with torch.no_grad():
            jacobians = {group.layout: group.jacobian(gradients, run.n) for group in run.groups}
        rows = {}
        if parameters:
            signs = torch.stack([Stream(0, examples, lo + j, v.device).signs() for j in range(len(v))])
            v = v * signs.to(v).view(*v.shape[:2], *[1] * (v.ndim - 2))
            pulled = pull_back(outputs, parameters, [p.shape for p in parameters], v, retain=True)
            rows = {name: flat_rows(g) for name, g in zip(run.rest, pulled)}
        yield Chunk(jacobians | batchwise(network.collection, rows), run.n, start, (lo, columns.count))


def batchwise(collection: LayerCollection, rows: Mapping[str, Tensor]) -> dict[Layout, FullJacobian]:
    """``[k, p]`` -> one row a cotangent, ``[k, 1, 1, 1, p]``."""
    return {collection.span([name]): FullJacobian(widened(row)[:, None, None, None]) for name, row in rows.items()}
