"""The mean row of every cotangent over the examples, and rows less that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nngeom.core.centred import CentredJacobian
from nngeom.core.errors import OutputError
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.totals import totals
from nngeom.fmat.chunks import span
from nngeom.sweep.sweep import Chunk, Sweep, require_examples


@dataclass(frozen=True)
class MeanRow:
    """The mean row of every cotangent, ``flat (k, d)``, and every layout met."""

    flat: torch.Tensor
    layouts: tuple[Layout, ...]

    def taken_from(self, chunk: Chunk) -> Chunk:
        """The rows of a chunk less their mean; parameters that a batch does not use had zero rows before."""
        jacobians, (k, _) = dict(chunk.jacobians), span(chunk)
        mean = self.flat[k]
        covered = {name for layout in jacobians for name in layout.names}
        for layout in self.layouts:
            if covered.isdisjoint(layout.names):
                jacobians[layout] = FullJacobian(mean.new_zeros(len(mean), chunk.examples, *layout.sizes))
                covered |= set(layout.names)
        rows = {layout: CentredJacobian(j, layout.gather(mean)) for layout, j in jacobians.items()}
        return replace(chunk, jacobians=rows)  # type: ignore[arg-type]


def mean_row(sweep: Sweep) -> MeanRow:
    """The mean row of every cotangent over the examples of all processes; raises :class:`OutputError` where batches
    differ in these.
    """
    network, team = sweep.run.network, sweep.run.team
    with team.together("mean row") as note:
        total, count, layouts = _summed_rows(sweep)
        note.mine = len(total), count, layouts
    columns = sorted({k for k, n, _ in note.all if n})
    _require_one(columns)
    total = total if count else total.new_zeros(*columns, network.collection.numel)
    team.sum_([total])
    met = dict.fromkeys(layout for _, _, theirs in note.all for layout in theirs)
    return MeanRow(total / require_examples(sum(n for _, n, _ in note.all)), tuple(met))


def _summed_rows(sweep: Sweep) -> tuple[torch.Tensor, int, tuple[Layout, ...]]:
    """The sum of the rows of every cotangent, of how many examples, and the layouts met, in this process."""
    network = sweep.run.network
    d, dtype = network.collection.numel, accumulation_dtype(network.dtype)
    total = torch.zeros(0, d, dtype=dtype, device=network.device)
    layouts: dict[Layout, None] = {}
    count = 0
    for chunk in sweep.chunks():
        (k, _), columns = span(chunk), chunk.cotangents[1]
        total = total if len(total) else total.new_zeros(columns, d)
        _require_one(sorted({len(total), columns}))
        part = total.new_zeros(k.stop - k.start, d)
        for layout, j in chunk.jacobians.items():
            layout.scatter_(part, totals(j).to(part.dtype))
            layouts[layout] = None
        total[k] += part
        count += chunk.examples if chunk.first else 0
    return total, count, tuple(layouts)


def _require_one(columns: list[int]) -> None:
    if len(columns) > 1:
        raise OutputError(
            f"batches have {columns[0]} and {columns[1]} outputs an example, which have no mean over examples output "
            "by output; expected the same number in all, positions included"
        )
