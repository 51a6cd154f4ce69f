"""Second moments of rows from which their mean over examples was taken first, row by row: output by output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.cotangents.by_output import ByOutput
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.per_example import Loss
from nngeom.measures.implicit_centred import implicit_centred
from nngeom.measures.mean_row import MeanRow, mean_row
from nngeom.pmat.drive import Repeated, Source, built
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import Representation, as_representation
from nngeom.sweep.agreement import agree, require_draws
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


def centred(run: Run, cotangents: Cotangents, chosen: Representation[Any], label: str) -> PMat:
    """The second moment of the rows of a run less their means, in a representation that was :func:`require_offered`.

    Two sweeps, the mean first, so that large means cancel before any square; the batches are kept between them. Bases
    are those of the second moment itself. ``label``: of the progress bar.
    """
    collection = run.network.collection
    chosen = chosen.within(collection)
    with run.within():
        sweep = Sweep(run, cotangents, Policy("mean row", part_of=chosen.division, reread=False)).held()
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
) -> ParameterOperator:
    """The Fisher or Gauss-Newton matrix of centred rows, output by output; raises for what does not go with it."""
    if estimator is not None:
        raise ArgumentError(f"estimator={estimator!r} and centered=True do not go together; leave one of them out")
    require_draws(index, drawn=False)
    if asked is not None:
        raise UnsupportedError("checkpoint= is not offered of a centred matrix; leave it out, or centered=True")
    if representation is PMatImplicit and not options:
        return implicit_centred(run, ByOutput(of), "centred")
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
            "PMatEKFAC (without sua), PMatKFAC with fit='nearest', PMatImplicit and other second moments of any rows, "
            f"not as {', '.join(kinds)}: centred rows have no Kronecker structure"
        )


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
