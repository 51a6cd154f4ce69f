"""Any cotangents in any representation: the representation's recipe driven over sweeps of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from nngeom.core.errors import UnsupportedError
from nngeom.cotangents.probes import Probes
from nngeom.measures.in_parts import in_parts
from nngeom.measures.probed import estimate, implicit_estimate
from nngeom.measures.streamed import streamed
from nngeom.pmat.drive import Repeated, Resumable, built
from nngeom.pmat.estimate import MatrixEstimate
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.implicit_fisher import implicit
from nngeom.pmat.in_parts import InParts
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import as_representation
from nngeom.sweep.agreement import agree, numbered
from nngeom.sweep.checkpoint import Asked
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy, Sweep


def measured(
    run: Run,
    cotangents: Cotangents,
    representation: Any,
    options: dict[str, Any],
    policy: Policy,
    *,
    index: Any = None,
    asked: Asked | None = None,
) -> ParameterOperator | MatrixEstimate:
    """The matrix of a run, or its estimate from random probes; ``index``: see :func:`numbered`; ``asked``: where sums
    are kept, if anywhere.
    """
    if asked is not None:
        return _kept(run, cotangents, representation, options, policy, index=index, asked=asked)
    if isinstance(representation, InParts) and not isinstance(cotangents, Probes):
        as_representation(representation, **options)  # raises for options beside those of the whole
        whole = representation.whole
        if representation.streamed:
            return _streamed(Sweep(run, cotangents, policy), representation, index)
        part = lambda some: cast(PMat, measured(some, cotangents, whole, {}, policy, index=index))
        return in_parts(Sweep(run, cotangents, policy), whole, part)
    with run.within():
        sweep = numbered(Sweep(run, cotangents, policy), index)
        fixed = replace(cotangents, seed=0) if hasattr(cotangents, "seed") else cotangents  # type: ignore[type-var]
        agree(run, policy.label, representation=representation, options=options, metric=fixed)
        if representation is PMatImplicit:
            return implicit_estimate(sweep) if isinstance(cotangents, Probes) else implicit(sweep)
        chosen = as_representation(representation, **options).within(run.network.collection)
        sweep = sweep.but(part_of=chosen.division, any_columns=chosen.any_columns)
        if isinstance(cotangents, Probes):
            return estimate(chosen, sweep)
        return built(chosen, run.network.collection, Repeated(sweep, chosen.passes))


def _streamed(sweep: Sweep, representation: InParts[Any], index: Any) -> ParameterOperator:
    """The matrix of which every process keeps a part, in one sweep."""
    cotangents: Any = sweep.cotangents
    fixed = replace(cotangents, seed=0) if hasattr(cotangents, "seed") else cotangents
    with sweep.run.within():
        sweep = numbered(sweep, index)
        agree(sweep.run, sweep.policy.label, representation=representation, metric=fixed)
        return streamed(sweep, representation.whole)


def _kept(
    run: Run,
    cotangents: Any,
    representation: Any,
    options: dict[str, Any],
    policy: Policy,
    *,
    index: Any,
    asked: Asked,
) -> PMat:
    """The matrix of a run whose sums are kept."""
    odd = {"a PMatImplicit has no sums": representation is PMatImplicit}
    odd |= {"of estimator='rademacher' none are kept": isinstance(cotangents, Probes)}
    odd |= {"a PMatSharded has those of some layers at a time": isinstance(representation, InParts)}
    for what in [what for what, is_so in odd.items() if is_so]:
        raise UnsupportedError(f"checkpoint= keeps the sums of a matrix, and {what}; leave it out")
    fixed = replace(cotangents, seed=0) if hasattr(cotangents, "seed") else cotangents
    settings = {"measure": policy.label, "representation": representation, "options": options, "metric": fixed}
    settings |= {"index": index, "seed": getattr(cotangents, "seed", None)}
    with run.within(), asked.begun(run, **settings) as checkpoint:
        sweep = numbered(Sweep(run, checkpoint.seeded(cotangents), policy), index)
        agree(run, policy.label, representation=representation, options=options, metric=fixed)
        chosen = as_representation(representation, **options).within(run.network.collection)
        sweep = sweep.but(part_of=chosen.division, any_columns=chosen.any_columns)
        return built(chosen, run.network.collection, Resumable(sweep, checkpoint))
