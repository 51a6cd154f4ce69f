"""One call of a model in training: its uses, and their rows of the user's loss or of a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.network import Network
from nngeom.core import memory
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import flat_rows
from nngeom.core.stream import Stream
from nngeom.pullback.backward import pull_back
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.sizes import bytes_each_cotangent
from nngeom.pullback.use_groups import wide
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.sweep import Chunk


class Passage:
    """One call of the model: its uses, and the gradients of their outputs as they arrive."""

    def __init__(self, network: Network, run: Pass, *, own_loss: bool):
        """With ``own_loss`` the gradients of the user's backward pass are read as they arrive."""
        self.network, self.capture, self.groups, self.rest = network, run.capture, run.groups, run.rest
        self.n = self.capture.outputs.shape[0]
        self.gradients: list[Tensor | None] = [None] * len(self.capture.uses)
        self.sums: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        if own_loss:
            self.handles += [
                use.edge.node.register_prehook(self._reader(j, use.edge.output_nr))
                for j, use in enumerate(self.capture.uses)
                if use.edge is not None
            ]
            self.handles += [self.network.parameters[name].register_hook(self._adder(name)) for name in self.rest]

    def _reader(self, j: int, output: int) -> Callable[[Any], None]:
        def read(grads: Any) -> None:
            g = grads[output]
            if g is not None:
                before = self.gradients[j]
                self.gradients[j] = g.detach() if before is None else before + g.detach()

        return read

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(g: Tensor) -> None:
            g = g.to_dense() if g.is_sparse else g
            self.sums[name] = g.detach().clone() if name not in self.sums else self.sums[name] + g.detach()

        return add

    @property
    def arrived(self) -> bool:
        """Whether a backward pass came by."""
        return bool(self.sums) or any(g is not None for g in self.gradients)

    @torch.no_grad()
    def chunk(self, start: int) -> Chunk:
        """The rows of the user's own loss."""
        zero = self.capture.outputs.detach().new_zeros(1)
        gradients = [
            zero.expand(1, *use.shape) if g is None else g.unsqueeze(0)
            for g, use in zip(self.gradients, self.capture.uses)
        ]
        jacobians = {group.layout: group.jacobian(gradients, self.n) for group in self.groups}
        rows = {name: self.sums[name].reshape(1, -1) for name in self.rest if name in self.sums}
        return Chunk(jacobians | self._batchwise(rows), self.n, start, (0, 1))

    def measured(self, cotangents: Cotangents, start: int) -> Iterator[Chunk]:
        """The rows of the cotangents of a metric, pulled back through the user's graph, which is kept.

        ``start``: the running index of the first example, which draws are keyed by.
        """
        outputs = self.capture.outputs
        examples = torch.arange(start, start + self.n)
        columns = cotangents.columns(outputs.detach(), None, start)
        edges, shapes = [u.edge for u in self.capture.uses], [u.shape for u in self.capture.uses]
        parameters = [self.network.parameters[name] for name in self.rest]
        size = memory.step(columns.count, bytes_each_cotangent(self.capture, keep_graph=False), "output of one batch")
        for lo in range(0, columns.count, size):
            v = columns.make(lo, min(columns.count, lo + size)).to(outputs.dtype)
            gradients = pull_back(outputs, edges, shapes, v, retain=True)
            with torch.no_grad():
                jacobians = {group.layout: group.jacobian(gradients, self.n) for group in self.groups}
            rows = {}
            if parameters:
                signs = torch.stack([Stream(0, examples, lo + j, v.device).signs() for j in range(len(v))])
                v = v * signs.to(v).view(*v.shape[:2], *[1] * (v.ndim - 2))
                pulled = pull_back(outputs, parameters, [p.shape for p in parameters], v, retain=True)
                rows = {name: flat_rows(g) for name, g in zip(self.rest, pulled)}
            yield Chunk(jacobians | self._batchwise(rows), self.n, start, (lo, columns.count))

    def _batchwise(self, rows: dict[str, Tensor]) -> dict[Layout, FullJacobian]:
        """``[k, p]`` -> one row a cotangent, ``[k, 1, 1, 1, p]``."""
        return {
            self.network.collection.span([name]): FullJacobian(wide(row)[:, None, None, None])
            for name, row in rows.items()
        }

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
