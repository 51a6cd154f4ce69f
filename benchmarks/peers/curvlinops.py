"""curvlinops: KFAC, EKFAC and matrix-free products as linear operators; the parameters of linear and convolutional
layers.
"""

from __future__ import annotations

from typing import Any

import curvlinops
import torch
from torch import Tensor, nn

from benchmarks import truth
from benchmarks.workloads import Workload


def _parameters(w: Workload) -> list[nn.Parameter]:
    return [p for m in truth.kronecker_layers(w).values() for p in m.parameters()]


def _slices(w: Workload) -> list[slice]:
    """Where the parameters of those layers are in the workload's flat vector."""
    where, at = {}, 0
    for p in w.model.parameters():
        where[id(p)], at = slice(at, at + p.numel()), at + p.numel()
    return [where[id(p)] for p in _parameters(w)]


def _read(w: Workload) -> Tensor:
    """The workload's direction in those parameters."""
    v = w.vector()
    return torch.cat([v[s] for s in _slices(w)])


def _written(product: Tensor, w: Workload) -> Tensor:
    """A result in those parameters as a flat vector of all; 0 elsewhere."""
    slices = _slices(w)
    out = torch.zeros_like(w.vector())
    for s, part in zip(slices, product.split([s.stop - s.start for s in slices])):
        out[s] = part
    return out


def _applied(m: Any, w: Workload) -> Tensor:
    return _written(m @ _read(w), w)


def _kfac(w: Workload, kind: str = "KFACLinearOperator", fisher_type: str = "type-2") -> Any:
    options = {"fisher_type": fisher_type, "separate_weight_and_bias": False, "check_deterministic": False}
    m = getattr(curvlinops, kind)(w.model, nn.CrossEntropyLoss(), _parameters(w), w.batches, **options)
    m.compute_kronecker_factors()
    return m


def kfac(w: Workload):
    """Exact, of a softmax."""
    return lambda: _kfac(w), lambda m: _applied(m, w)


def monte_carlo_kfac(w: Workload):
    """One drawn label an example."""

    def factors(m: Any) -> Tensor:
        found = [
            m._input_covariances[name][:-1, :-1] for name in truth.kronecker_layers(w)
        ]  # nothing public shows them
        return torch.cat([(a / a.norm()).flatten() for a in found])

    return lambda: _kfac(w, fisher_type="mc"), factors


def ekfac(w: Workload):
    """Basis and scalings."""

    def run() -> Any:
        m = _kfac(w, "EKFACLinearOperator")
        m.compute_eigenvalue_correction()
        return m

    return run, lambda m: _applied(m, w)


def fisher_vector(w: Workload):
    """Matrix-free; the operator is built once."""
    m = curvlinops.GGNLinearOperator(
        w.model, nn.CrossEntropyLoss(), list(w.model.parameters()), w.batches, check_deterministic=False
    )
    v = w.vector()
    return lambda: m @ v, lambda out: out


def kfac_solve(w: Workload):
    """Factors given, factorised at every call; the factored damping."""
    m, v = _kfac(w), _read(w)
    run = lambda: curvlinops.KFACInverseLinearOperator(m, damping=1e-2, use_heuristic_damping=True) @ v
    return run, lambda out: _written(out, w)


CONTENDERS = {"curvlinops": {"J2": kfac, "J3": monte_carlo_kfac, "J4": ekfac, "J8": fisher_vector, "J10": kfac_solve}}
