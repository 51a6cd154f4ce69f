"""The rows of all outputs beside the labels of their examples, which may lie on several processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.analysis.labels import described
from nngeom.analysis.rows import require_labels
from nngeom.capture.network import targets
from nngeom.core.errors import OutputError, RankMismatchError
from nngeom.core.layout import Layout
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.side import Side
from nngeom.fmat.tiles import require_finite
from nngeom.pmat.recipe import join_rows
from nngeom.ranks.totals import gathered, totals
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import require_examples


@dataclass(frozen=True)
class Labelled:
    """The rows of this process's examples, and the ``labels`` ``(n, ...)`` of those of all, in rank order.

    ``start``: the number of its first example; ``outputs``: ``c``; ``shape``: that of an example's outputs, for labels
    of positions; ``dtype``: of the rows.
    """

    side: Side
    labels: Tensor
    start: int
    outputs: int
    shape: tuple[int, ...] | None
    dtype: torch.dtype

    @staticmethod
    def of(run: Run) -> Labelled:
        """Of a run; raises :class:`LoaderError` without labels or examples, :class:`OutputError` where these are not as
        many, :class:`RankMismatchError` where labels or outputs are of another kind on another process.
        """
        y: Tensor | None = None
        with run.team.together("labels") as note:
            held = run.held()
            side = Side.of(held, EveryOutput())
            if held.loader:
                y = _sendable(require_labels(held))
                _require_one_each(held)
                positions = y.numel() > len(y) and not y.is_floating_point()
                shape = tuple(held.network.run(held.loader[0]).shape[1:]) if positions else None
                note.mine = len(y), (tuple(y.shape[1:]), y.dtype), (side.outputs, shape, side.dtype), described(y)
        known = {rank: said for rank, said in enumerate(note.all) if said is not None}
        require_examples(len(known))
        (first, (_, kind, outputs, text)), *rest = known.items()
        for rank, said in rest:
            if said[1:3] != (kind, outputs):
                raise RankMismatchError(
                    f"rank {first} has {text} and {outputs[0]} outputs, rank {rank} {said[3]} and {said[2][0]}; "
                    "expected labels and outputs of one kind on all processes"
                )
        start = sum(said[0] for rank, said in known.items() if rank < run.team.rank)
        labels = gathered(run.team, "labels", lambda: y, run.network.device)
        return Labelled(side, labels, start, *outputs)

    def moments(self, layout: Layout, names: tuple[str, ...], v: Tensor) -> list[Tensor]:
        """``(p, p)``, ``(c, p)`` and ``(p,)``: the sums over all examples of products of rows, of rows by output, and
        of rows times their entries of ``v`` ``(c, n)``, for the parameters ``names`` of a ``layout``.
        """

        def own() -> tuple[list[Tensor], int]:
            p = layout.numel
            second, sums, signal = v.new_zeros(p, p), v.new_zeros(v.shape[0], p), v.new_zeros(p)
            for chunk in (c for group in self.side.groups() for c in group.chunks):
                y, n = chunk.cotangents[0], self.start + chunk.start
                for rows in join_rows(chunk, layout, names):
                    c, m, _ = rows.shape
                    second += rows.flatten(0, 1).T @ rows.flatten(0, 1)
                    sums[y : y + c] += rows.sum(1)
                    signal += torch.einsum("knp,kn->p", rows, v[y : y + c, n : n + m])
                    n += m
            require_finite([second, sums, signal])
            return [second, sums, signal], self.side.examples

        return totals(self.side.run.team, "moments of rows", own)[0]


def _require_one_each(held: Run) -> None:
    """Raise :class:`OutputError` where a batch has not as many labels as examples."""
    for index, (batch, size) in enumerate(zip(held.loader, held.sizes)):
        if len(targets(batch)) != size:
            raise OutputError(f"batch {index} has {len(targets(batch))} labels of {size} examples; expected one each")


def _sendable(y: Tensor) -> Tensor:
    return y if y.is_floating_point() or y.is_complex() else y.long()
