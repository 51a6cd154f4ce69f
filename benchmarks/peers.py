"""Other libraries doing the same jobs, through their public interfaces, where they are installed (extras ``bench``).

Each is asked for what its documentation calls the exact Fisher matrix of a softmax; what disagrees with the slow
reference on a workload is named as skipped there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import truth
from benchmarks.workloads import Workload


def _loader(w: Workload) -> DataLoader:
    return DataLoader(TensorDataset(w.inputs, w.targets), batch_size=len(w.batches[0][0]))


def _nngeometry(kind: str, canonical: str):
    def setup(w: Workload):
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM
        from nngeometry.object import pspace
        from nngeometry.object.vector import PVector

        representation, loader = getattr(pspace, kind), _loader(w)

        def run() -> Any:
            m = FIM(w.model, loader, representation, device=w.inputs.device)
            if kind == "PMatEKFAC":
                m.update_diag(loader)
            return m

        def result(m: Any) -> Tensor:
            if canonical == "diag":
                return m.get_diag()
            v = PVector(LayerCollection.from_model(w.model), vector_repr=w.vector())
            return m.mv(v).to_torch()

        return run, result

    return setup


def _curvlinops(kind: str, **options: Any):
    def setup(w: Workload):
        import curvlinops

        parameters, loss = list(w.model.parameters()), nn.CrossEntropyLoss()
        if kind != "GGNLinearOperator":
            keep = truth.kronecker_layers(w)
            parameters = [p for m in keep.values() for p in m.parameters()]
        where = {id(p): slice(lo, lo + p.numel()) for p, lo in zip(w.model.parameters(), _offsets(w))}

        def build() -> Any:
            return getattr(curvlinops, kind)(w.model, loss, parameters, w.batches, check_deterministic=False, **options)

        def result(m: Any) -> Tensor:
            v = w.vector()
            out = torch.zeros_like(v)
            product = m @ torch.cat([v[where[id(p)]] for p in parameters])
            for p, part in zip(parameters, product.split([p.numel() for p in parameters])):
                out[where[id(p)]] = part
            return out

        if kind == "GGNLinearOperator":
            m, v = build(), w.vector()
            return lambda: m @ v, lambda out: out

        def run() -> Any:
            m = build()
            m.compute_kronecker_factors()
            if kind == "EKFACLinearOperator":
                m.compute_eigenvalue_correction()
            return m

        return run, result

    return setup


def _offsets(w: Workload) -> list[int]:
    sizes = [p.numel() for p in w.model.parameters()]
    return [sum(sizes[:j]) for j in range(len(sizes))]


def _backpack(extension: str):
    def setup(w: Workload):
        import copy

        import backpack

        model = backpack.extend(copy.deepcopy(w.model))
        loss = backpack.extend(nn.CrossEntropyLoss())

        def run() -> Tensor:
            total = 0
            for x, y in w.batches:
                with backpack.backpack(getattr(backpack.extensions, extension)()):
                    loss(model(x), y).backward()
                total = total + len(x) / w.n * torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
                for p in model.parameters():
                    p.grad = None
            return total

        return run, lambda d: d

    return setup


CANDIDATES = {
    "nngeometry": {
        "J1": _nngeometry("PMatDiag", "diag"),
        "J2": _nngeometry("PMatKFAC", "mv"),
        "J4": _nngeometry("PMatEKFAC", "mv"),
    },
    "curvlinops": {
        "J2": _curvlinops("KFACLinearOperator", fisher_type="type-2", separate_weight_and_bias=False),
        "J4": _curvlinops("EKFACLinearOperator", fisher_type="type-2", separate_weight_and_bias=False),
        "J8": _curvlinops("GGNLinearOperator"),
    },
    "backpack": {"J1": _backpack("DiagGGNExact")},
}


def peers(job: str) -> dict[str, Any]:
    """The contenders of other libraries that are installed."""
    installed = [name for name in CANDIDATES if importlib.util.find_spec(name) is not None]
    return {name: CANDIDATES[name][job] for name in installed if CANDIDATES[name].get(job) is not None}
