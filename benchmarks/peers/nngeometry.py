"""NNGeometry: hooks on modules, one backward pass an output."""

from __future__ import annotations

from typing import Any

import torch
from nngeometry.gram import GramMatrix
from nngeometry.jacobian import Jacobian
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import pspace
from nngeometry.object.vector import PVector
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workloads import Workload


def _loader(w: Workload) -> DataLoader:
    return DataLoader(TensorDataset(w.inputs, w.targets), batch_size=len(w.batches[0][0]))


def _vector(w: Workload) -> PVector:
    return PVector(LayerCollection.from_model(w.model), vector_repr=w.vector())


def _fisher(w: Workload, kind: str, **options: Any) -> Any:
    return FIM(w.model, _loader(w), getattr(pspace, kind), device=w.inputs.device, **options)


def diagonal(w: Workload):
    """Exact, of a softmax."""
    return lambda: _fisher(w, "PMatDiag"), lambda m: m.get_diag()


def kfac(w: Workload):
    """Exact, of a softmax."""
    return lambda: _fisher(w, "PMatKFAC"), lambda m: m.mv(_vector(w)).to_torch()


def monte_carlo_kfac(w: Workload):
    """One drawn label an example."""
    run = lambda: FIM_MonteCarlo(w.model, _loader(w), pspace.PMatKFAC, trials=1, device=w.inputs.device)
    factors = lambda m: [a[:-1, :-1] for a, _ in m.data.values()]
    return run, lambda m: torch.cat([(a / a.norm()).flatten() for a in factors(m)])


def ekfac(w: Workload):
    """Eigenbasis, then scalings in a second sweep."""
    loader = _loader(w)

    def run() -> Any:
        m = _fisher(w, "PMatEKFAC")
        m.update_diag(loader)
        return m

    return run, lambda m: m.mv(_vector(w)).to_torch()


def rows(w: Workload):
    """Explicit Jacobian rows."""
    run = lambda: Jacobian(w.model, _loader(w), function=lambda x, y: w.model(x))
    return run, lambda j: j.to_torch().flatten()


def gram(w: Workload):
    """The tangent kernel of all outputs."""
    run = lambda: GramMatrix(w.model, _loader(w), function=lambda x, y: w.model(x))
    return run, lambda k: k.data.flatten()


def trace(w: Workload):
    """Of the kernel: ``n`` times the trace of the Gauss-Newton matrix of unit variance, from its diagonal."""
    return lambda: w.n * _fisher(w, "PMatDiag", variant="regression").trace(), lambda t: t.reshape(1)


def fisher_vector(w: Workload):
    """Matrix-free; the operator is built once."""
    m, v = _fisher(w, "PMatImplicit"), _vector(w)
    return lambda: m.mv(v), lambda out: out.to_torch()


def loss_gradients(w: Workload):
    """Rows of the loss as the one output."""
    loss = lambda x, y: F.cross_entropy(w.model(x), y, reduction="none").unsqueeze(1)
    return lambda: Jacobian(w.model, _loader(w), function=loss), lambda j: j.to_torch().flatten()


def kfac_solve(w: Workload):
    """Factors given; the factored damping."""
    m, v = _fisher(w, "PMatKFAC"), _vector(w)

    def result(out: Any) -> Tensor:
        return out.to_torch()

    return lambda: m.solve(v, regul=1e-2), result


CONTENDERS = {
    "nngeometry": {
        "J1": diagonal,
        "J2": kfac,
        "J3": monte_carlo_kfac,
        "J4": ekfac,
        "J5": rows,
        "J6": gram,
        "J7": trace,
        "J8": fisher_vector,
        "J9": loss_gradients,
        "J10": kfac_solve,
    }
}
