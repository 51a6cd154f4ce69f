"""Second moments of rows from which their mean over examples was taken first, row by row: output by output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nngeom.core.centred import CentredJacobian
from nngeom.core.errors import ArgumentError, OutputError, UnsupportedError
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.by_output import ByOutput
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.per_example import Loss
from nngeom.fmat.chunks import span
from nngeom.pmat.drive import Repeated, Source, built
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import Representation, as_representation
from nngeom.sweep.agreement import agree, require_draws
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep, require_examples


def centred(run: Run, cotangents: Cotangents, chosen: Representation[Any], label: str) -> PMat:
    """The second moment of the rows of a run less their means, in a representation that was :func:`require_offered`.

    Two sweeps, the mean first, so that large means cancel before any square; the batches are kept between them. Bases
    are those of the second moment itself. ``label``: of the progress bar.
    """
    collection = run.network.collection
    chosen = chosen.within(collection)
    with run.within():
        sweep = Sweep(run, cotangents, Policy("mean row", part_of=chosen.part_of, reread=False)).held()
        agree(run, label, representation=chosen, metric=cotangents)
        mean = mean_row(sweep)
        sweep = sweep.but(label=label, reread=True)
        if not chosen.centred:
            chosen = chosen.last_sweep(built(chosen, collection, Repeated(sweep, chosen.passes)))
        result: PMat = built(chosen, collection, Centred(Repeated(sweep, chosen.passes), mean))
        return result


def centred_moments(
    run: Run,
    of: Likelihood | Loss,
    representation: Any,
    options: dict[str, Any],
    estimator: str | None,
    index: Any,
    *,
    asked: Any = None,
) -> PMat:
    """The Fisher or Gauss-Newton matrix of centred rows, output by output; raises for what does not go with it."""
    if estimator is not None:
        raise ArgumentError(f"estimator={estimator!r} and centered=True do not go together; leave one of them out")
    require_draws(index, drawn=False)
    if asked is not None:
        raise UnsupportedError("checkpoint= is not offered of a centred matrix; leave it out, or centered=True")
    if representation is PMatImplicit:
        raise UnsupportedError(
            "a centred matrix is not offered as a PMatImplicit; use PMatLowRank, PMatDense, PMatBlockDiag, PMatDiag or "
            "PMatEKFAC, or GradientCovariance of a loss"
        )
    chosen = as_representation(representation, **options)
    require_offered(chosen, "a centred matrix")
    return centred(run, ByOutput(of), chosen, "centred")


def require_offered(chosen: Representation[Any], what: str) -> None:
    """Raise, of ``what``, unless centred rows may enter, or do in the last sweep, in bases that others gave."""
    members = getattr(chosen, "members", (chosen,))
    kinds = [r.kind.__name__ for r in members if not r.centred and (r.passes == 1 or r.settings.get("sua"))]
    if kinds:
        raise UnsupportedError(
            f"{what} is offered as PMatDense, PMatDiag, PMatBlockDiag, PMatQuasiDiag, PMatLowRank, "
            "PMatEKFAC (without sua), PMatImplicit and other second moments of any rows, not as "
            f"{', '.join(kinds)}: centred rows have no Kronecker structure"
        )


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


@dataclass(frozen=True)
class Centred:
    """A source of rows less their mean."""

    rows: Source
    mean: MeanRow

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the data."""
        return map(self.mean.taken_from, self.rows.chunks())

    @property
    def run(self) -> Run | None:
        """The model, this process's data, and the processes it is split over."""
        return self.rows.run

    def restart(self) -> None:
        """Forget what is kept of the first pass: the next is over the data."""
        self.rows.restart()

    def raise_where_not_finite(self) -> None:
        """Raise for the first batch with outputs or gradients that are not finite, if there is one."""
        self.rows.raise_where_not_finite()


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
            ones = torch.ones(1, chunk.examples, dtype=j.dtype, device=j.device)
            rows = [j.cotangents(i, i + 1).vjp(ones) for i in range(j.shape[0])]
            layout.scatter_(part, torch.stack(rows).to(part.dtype))
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
