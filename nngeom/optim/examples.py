"""Gradients of single examples, those of all processes that share a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import CoverageError, RankMismatchError, UnevenBatchWarning
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.parts import features, join, joins
from nngeom.pmat.recipe import write_rows
from nngeom.ranks.fingerprint import digest_of, ranks_text
from nngeom.ranks.merged import told
from nngeom.ranks.team import ALONE
from nngeom.space.collection import LayerCollection
from nngeom.sweep.observe import Observation, Observer
from nngeom.sweep.sweep import Chunk


class Examples:
    """Gradients of single examples, held as the Jacobians of their batches and read some coordinates at a time."""

    def __init__(self, collection: LayerCollection, observer: Observer | None = None):
        self.collection, self.observer, self.examples = collection, observer, 0
        self.team = ALONE if observer is None else observer.team
        self._batches: list[tuple[dict[Layout, LayerJacobian], float]] = []
        self._sizes, self._alike = [0], True  # of all processes

    def wants_rows(self) -> bool:
        """Of every pass."""
        return True

    def wants_positions(self) -> bool:
        """They do not matter to sums over examples."""
        return False

    def take(self, observation: Observation, scaler: Any = None) -> None:
        """The examples of an ``observation``, with the ``scaler`` of its loss."""
        left = self.observer.batchwise if self.observer is not None else ()
        if left:
            raise CoverageError(
                f"parameters {sorted(left)[:4]} have no per-example gradients here; use winsorized_gradient for this "
                "model"
            )
        with torch.no_grad():
            for chunk in observation.chunks:
                self.add(chunk, 1.0 if scaler is None else 1 / scaler.get_scale())
        observation.chunks.clear()

    def forget(self) -> None:
        """Hold none, in place: a wrapper of the optimizer (Lightning's) would keep to itself what is assigned."""
        self.examples = 0
        self._batches.clear()

    def add(self, chunk: Chunk, scale: float = 1.0) -> None:
        """One batch; copied, because what a model computed may be overwritten before it is read."""
        copies = {
            layout: join(j, []) if joins(j, j) else FullJacobian(j.matrix()) for layout, j in chunk.jacobians.items()
        }
        self._batches.append((copies, scale))
        self.examples += chunk.examples

    def meet(self) -> None:
        """Learn of the examples of all processes: their rows sum up to ``.grad`` of a replicated model, their mean.

        Raises :class:`RankMismatchError` where some have none and others do.
        """
        structures = sorted({repr([told(layout) for layout in jacobians]) for jacobians, _ in self._batches})
        said = self.team.exchange("step", (self.examples, len(structures) < 2, digest_of(structures)))
        self._sizes = [n for n, _, _ in said]
        self._alike = all(alike for _, alike, _ in said) and len({digest for _, _, digest in said}) == 1
        empty = [rank for rank, n in enumerate(self._sizes) if not n]
        if empty and len(empty) < len(said):
            raise RankMismatchError(
                f"{ranks_text(empty)} of {len(said)} observed no example since the last step, and others did; expected "
                "forward and backward passes on all processes"
            )
        if len(set(self._sizes)) > 1:
            warnings.warn(
                f"the processes saw {min(self._sizes)} to {max(self._sizes)} examples: the mean over processes is not "
                "that over examples; use batches of one size",
                UnevenBatchWarning,
                stacklevel=4,
            )

    def _joined(self, rows: Tensor) -> Tensor:
        """Rows ``[n, ...]`` of all processes, in rank order, as the mean over these has them."""
        if self.team.size == 1:
            return rows
        return self.team.rows((rows / self.team.size).contiguous(), self._sizes)

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """``reduce: [n, p] -> [p]`` of all examples, coordinate by coordinate: ``[d]``."""
        like = next(iter(self._batches[0][0].values()))
        out = torch.zeros(self.collection.numel, dtype=like.dtype, device=like.device)
        alike = all(jacobians.keys() == self._batches[0][0].keys() for jacobians, _ in self._batches)
        if not alike or not self._alike:  # batches of unlike structure, here or elsewhere
            rows = torch.cat([scale * self._rows(jacobians, out) for jacobians, scale in self._batches])
            return reduce(self._joined(rows))
        examples = max(self.examples, sum(self._sizes))
        for layout in self._batches[0][0]:
            _, _, s, o, i = self._batches[0][0][layout].shape
            m = out.new_empty(s, o, i)
            cut = 0 if s > 1 else 1
            bytes_each = 4 * examples * (o if s > 1 else 1) * i * out.element_size()
            cuts = list(memory.pieces(m.shape[cut], bytes_each, "coordinate of all examples"))
            for lo, hi in self.team.first("coordinates", cuts):
                rows = torch.cat(
                    [scale * features(jacobians[layout], lo, hi).matrix()[0] for jacobians, scale in self._batches]
                )  # [n s o i]
                m.narrow(cut, lo, hi - lo).copy_(reduce(self._joined(rows.flatten(1))).view(rows.shape[1:]))
            layout.scatter_(out, m)
        return out

    def _rows(self, jacobians: dict[Layout, LayerJacobian], like: Tensor) -> Tensor:
        rows = like.new_zeros(1, next(iter(jacobians.values())).shape[1], self.collection.numel)
        for layout, j in jacobians.items():
            write_rows(rows, j, layout)
        return rows[0]
