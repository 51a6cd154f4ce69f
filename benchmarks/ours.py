"""The jobs in this library. A contender is ``(workload) -> (run, canonical)``; ``canonical`` makes results
comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nngeom as nng
from benchmarks.workloads import Workload
from nngeom.pullback.proofs import forget

Contender = Callable[[Workload], tuple[Callable[[], Any], Callable[[Any], Tensor]]]


def vector(w: Workload, lc: Any) -> nng.PVector:
    """The workload's direction as a PVector."""
    return nng.PVector.from_flat(lc, w.vector())


def fisher(
    representation: Any,
    canonical: Callable[[Any, Workload], Tensor],
    measure: Callable[..., Any] = nng.FIM,
    **options: Any,
) -> Contender:
    """A build of a Fisher matrix."""

    def setup(w: Workload):
        return lambda: measure(w.model, w.batches, representation, **options), lambda m: canonical(m, w)

    return setup


def _times(m: Any, w: Workload) -> Tensor:
    return m.mv(vector(w, m.layer_collection)).flat()


def _input_factors(m: Any, w: Workload) -> Tensor:
    weights = [b.a[0, :-1, :-1] for b in m.blocks.values() if b.g.shape[-1] > 1]
    return torch.cat([(a / a.norm()).flatten() for a in weights])


def monte_carlo_kfac() -> Contender:
    """One drawn label an example; the gradient factors are random, so the input factors are compared."""

    def setup(w: Workload):
        generator = torch.Generator().manual_seed(0)
        run = lambda: nng.FIM_MonteCarlo(w.model, w.batches, nng.PMatKFAC, generator=generator)
        return run, lambda m: _input_factors(m, w)

    return setup


def fisher_vector(w: Workload):
    """Matrix-free; the operator is built once."""
    m = nng.FIM(w.model, w.batches, nng.PMatImplicit)
    v = vector(w, m.layer_collection)
    return lambda: m.mv(v), lambda out: out.flat()


def kfac_solve(w: Workload):
    """Factors given, factorised at every call, with the factored damping that the peers have."""
    m = nng.FIM(w.model, w.batches, nng.PMatKFAC)
    v = vector(w, m.layer_collection)
    return lambda: m.solve(v, nng.FactoredTikhonov(1e-2)), lambda out: out.flat()


def gram(representation: str, canonical: Callable[[Any], Tensor]) -> Contender:
    """The tangent kernel."""

    def setup(w: Workload):
        return lambda: nng.GramMatrix(w.model, w.batches, getattr(nng, representation)), canonical

    return setup


def rows() -> Contender:
    """Explicit Jacobian rows."""

    def setup(w: Workload):
        return lambda: nng.Jacobian(w.model, w.batches), lambda j: j.tensor.flatten()

    return setup


def loss_gradients() -> Contender:
    """Per-example gradients of the loss, as rows of a Jacobian of one output."""

    def setup(w: Workload):
        def loss(x, y):
            return F.cross_entropy(w.model(x), y, reduction="none").unsqueeze(1)

        return lambda: nng.Jacobian(w.model, w.batches, function=loss), lambda j: j.tensor.flatten()

    return setup


def penalty_step(estimator: str) -> Contender:
    """Gradient of the loss plus 1e-3 times the mean kernel trace."""

    def setup(w: Workload):
        parameters = list(w.model.parameters())
        x, y = w.batches[0]

        def run():
            trace, outputs = nng.mgs.trace_penalty(
                w.model, x, estimator=estimator, reduction="mean", return_outputs=True
            )
            loss = F.cross_entropy(outputs, y) + 1e-3 * trace
            return torch.autograd.grad(loss, parameters, materialize_grads=True)

        return run, lambda g: torch.cat([t.flatten() for t in g])

    return setup


def _diagonal(m: Any, w: Workload) -> Tensor:
    return m.diag().flat()


def both(contender: Contender) -> dict[str, Contender]:
    """On a model that was measured before, and on one that was not: the check proves a model once."""

    def first(w: Workload):
        run, canonical = contender(w)

        def anew():
            forget(w.model)
            return run()

        return anew, canonical

    return {"nngeom": contender, "nngeom (first call)": first}


JOBS: dict[str, dict[str, Contender]] = {
    "J1": both(fisher(nng.PMatDiag, _diagonal)),
    "J2": both(fisher(nng.PMatKFAC, _times)),
    "J3": both(monte_carlo_kfac()),
    "J4": both(fisher(nng.PMatEKFAC, _times)),
    "J5": both(rows()),
    "J6": both(gram("FMatDense", lambda k: k.to_dense().flatten())),
    "J7": both(gram("FMatDiag", lambda k: k.trace().reshape(1))),
    "J8": {"nngeom": fisher_vector},
    "J9": both(loss_gradients()),
    "J10": {"nngeom": kfac_solve},
    "J11": {"nngeom": penalty_step("exact"), "nngeom (one random probe)": penalty_step("rademacher")},
}
